"""Gathers and bytes moved in a training step, by rank: chunked and plain, under each sharding engine.

Ranks are processes of this machine, on gloo without a GPU, on NCCL with `--device cuda`. The first has the
whole sequence, the others half of it, and so half as many chunks. Collectives and their bytes are counted at
the process group (`chunkdist.sharding.collectives`), in a step after two to warm up. ZeRO-3 is told to
release each weight when the layer that uses it is done; a step of DeepSpeed's engines has their optimizer
step in it, a plain SGD. Counts and bytes depend on neither the network nor the processor.

    python -m chunkdist.bench.sharding [--smoke] [--json FILE] [--device cuda] [--model 1b] [--num-ranks N]
        [--num-tokens N] [--chunk-size N] [--only WORD]
"""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.spawn import start_processes

from chunkdist.bench.environment import provenance, write_partial, write_result
from chunkdist.bench.options import check_counts, parsed, parser_of
from chunkdist.bench.sharding_ranks import ENGINES, Case, run_cases
from chunkdist.bench.sizes import SIZES, Sizes

PLAIN = "plain"
REDUCTIONS = ("reduce-scatter", "all-reduce")


def cases(num_tokens: int, chunk_size: int, *, has_deepspeed: bool, only: str = "") -> Iterator[Case]:
    """What is run, by engine: full training and LoRA, plain, in one chunk, in many."""
    for engine in ENGINES:
        if (engine.startswith("ZeRO") and not has_deepspeed) or only not in engine:
            continue
        for lora in (False, True):
            yield Case(engine=engine, way=PLAIN, chunk_size=None, lora=lora)
            if engine == "ZeRO-3":
                yield Case(
                    engine=engine, way=f"{PLAIN}, layers are leaves", chunk_size=None, lora=lora, leaves=True
                )
            yield Case(engine=engine, way="1 chunk", chunk_size=num_tokens, lora=lora)
            many = -(-num_tokens // chunk_size)
            yield Case(engine=engine, way=f"{many} chunks", chunk_size=chunk_size, lora=lora)


def measure(
    chosen: Sequence[Case],
    sizes: Sizes,
    lengths: list[int],
    *,
    device: str,
    write: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Starts the ranks, which run all cases; what the JSON holds.

    Args:
        lengths: Tokens, by rank.
        write: Called as cases end, with what there is so far.

    Raises:
        torch.multiprocessing.ProcessRaisedException: a rank failed; the others have been stopped.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # Forked from a process that has imported torch and transformers, and has not touched CUDA.
        multiprocessing.get_context("forkserver").set_forkserver_preload([run_cases.__module__])
        ranks = start_processes(
            partial(run_cases, device_type=device, folder=folder),
            args=(list(chosen), sizes, lengths),
            nprocs=len(lengths),
            start_method="forkserver",
            join=False,
        )
        head = {
            "model": asdict(sizes),
            "num_ranks": len(lengths),
            "lengths": lengths,
            "parameter_bytes": _parameter_bytes(sizes, device),
        }
        rows: list[dict[str, Any]] = []
        try:
            ended = False
            while not ended:
                ended = ranks.join(timeout=1)
                found = _rows(chosen, folder, len(lengths))
                if len(found) > len(rows):
                    rows = found
                    write({**head, "rows": rows})
        finally:
            for process in ranks.processes:  # interrupted, or a rank failed: the others wait for it
                if process.is_alive():
                    process.kill()
    assert len(rows) == len(chosen)
    return {**head, "rows": rows}


def _rows(chosen: Sequence[Case], folder: Path, num_ranks: int) -> list[dict[str, Any]]:
    """Of the cases that all ranks have ended."""
    files = [folder / f"{rank}.json" for rank in range(num_ranks)]
    by_rank = [json.loads(file.read_text(encoding="utf-8")) if file.exists() else [] for file in files]
    return [row_of(case, found) for case, *found in zip(chosen, *by_rank, strict=False)]


def row_of(case: Case, by_rank: list[dict[str, dict[str, int]]]) -> dict[str, Any]:
    """Of one case: the first rank's figures, whether all ranks have the same, and those by kind."""

    def total(figure: str, kinds: Sequence[str]) -> int:
        return sum(traffic[figure] for kind, traffic in by_rank[0].items() if kind in kinds)

    training = "LoRA" if case.lora else "full"
    return {
        "engine": case.engine,
        "training": training,
        "way": case.way,
        "gathers": total("count", ["all-gather"]),
        "gathered_bytes": total("whole_bytes", ["all-gather"]),
        "reductions": total("count", REDUCTIONS),
        "reduced_bytes": total("whole_bytes", REDUCTIONS),
        "sent_bytes": total("sent_bytes", list(by_rank[0])),
        "all_ranks_alike": all(found == by_rank[0] for found in by_rank),
        "by_kind": by_rank[0],
    }


def _parameter_bytes(sizes: Sizes, device: str) -> int:
    model = replace(sizes, lora_rank=0).model("meta", torch.bfloat16 if device == "cuda" else torch.float32)
    return sum(parameter.nbytes for parameter in model.parameters())


def table(result: dict[str, Any]) -> str:
    """The rows, for people to read."""
    lengths = ", ".join(f"{length:,}" for length in result["lengths"])
    lines = [
        f"{result['num_ranks']} ranks with {lengths} tokens; weights: {_mib(result['parameter_bytes'])} MiB",
        "",
        f"{'in a step, of a rank':52}{'gathers':>8}{'MiB':>10}{'reductions':>12}{'MiB':>10}{'sent MiB':>10}",
    ]
    for row in result["rows"]:
        name = f"{row['engine']}, {row['training']}, {row['way']}"
        alike = "" if row["all_ranks_alike"] else "  other ranks differ"
        lines.append(
            f"{name:52}{row['gathers']:8}{_mib(row['gathered_bytes']):>10}{row['reductions']:12}"
            f"{_mib(row['reduced_bytes']):>10}{_mib(row['sent_bytes']):>10}{alike}"
        )
    return "\n".join(lines)


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.2f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = parser_of("sharding", "Gathers and bytes moved, by engine.", "model", "device")
    parser.add_argument("--num-ranks", type=int, help="default: 2; with --device cuda, all GPUs")
    parser.add_argument("--num-tokens", type=int, help="of the first rank; default: 512, on cuda the model's")
    parser.add_argument("--chunk-size", type=int, help="of many chunks; default: an eighth of the tokens")
    parser.add_argument("--only", default="", metavar="WORD", help="the engines whose names have it")
    options = parsed(parser, given)
    check_counts(parser, options, "num_ranks")
    on_gpu = options.device == "cuda"
    if options.device not in ("cpu", "cuda"):
        parser.error(f"--device {options.device}: each rank has a device of its own: write cpu or cuda")
    num_gpus = torch.cuda.device_count()
    num_ranks = options.num_ranks or (num_gpus if on_gpu else 2)
    if on_gpu and not 2 <= num_ranks <= num_gpus:
        parser.error(f"--device cuda: {num_ranks} ranks on {num_gpus} GPUs: 2 or more, each on its own")
    sizes = SIZES["smoke" if options.smoke else options.model]
    default_tokens = sizes.num_tokens if on_gpu or options.smoke else 512
    num_tokens = options.num_tokens or default_tokens
    chunk_size = options.chunk_size or max(1, num_tokens // 8)
    has_deepspeed = importlib.util.find_spec("deepspeed") is not None
    chosen = list(cases(num_tokens, chunk_size, has_deepspeed=has_deepspeed, only=options.only))
    if not chosen:
        parser.error(f"--only {options.only}: no engine has it in its name, or DeepSpeed is not installed")
    lengths = [num_tokens, *[max(1, num_tokens // 2)] * (num_ranks - 1)]
    head = {
        **provenance("sharding", given, device=options.device),
        "left_out": [] if has_deepspeed else ["ZeRO-2, ZeRO-3: deepspeed is not installed"],
        "chunk_size": chunk_size,
    }
    found = measure(
        chosen,
        replace(sizes, num_tokens=num_tokens),
        lengths,
        device=options.device,
        write=lambda found: write_partial({**head, **found}, options.json),
    )
    result = {**head, **found}
    print("\n".join([table(result), *result["left_out"]]))
    write_result(result, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
