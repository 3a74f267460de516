"""Gathers and bytes moved in a training step, by rank: chunked and plain, under each sharding engine.

Ranks are processes of this machine, on gloo without a GPU, on NCCL with `--device cuda`. The first has the
whole sequence, the others half of it, and so half as many chunks. Collectives and their bytes are counted at
the process group (`chunkdist.sharding.collectives`), in a step after two to warm up. ZeRO-3 is told to
release each weight when the layer that uses it is done; a step of DeepSpeed's engines has their optimizer
step in it, a plain SGD. Counts and bytes depend on neither the network nor the processor.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import start_processes

from chunkdist import ChunkConfig, chunk_model
from chunkdist.bench.models import SIZES, Sizes
from chunkdist.bench.options import count, parser_of
from chunkdist.bench.report import Run
from chunkdist.bench.timing import report_progress
from chunkdist.loss.lazy_logits import lazy_logits
from chunkdist.sharding.collectives import CollectiveCounter

PLAIN, LEAVES = "plain", "plain, layers are leaves"
GROUP = 2
GROUP_UNITS = f"FSDP2, units of {GROUP} layers"
"""In it, so many layers are a unit, and a group."""
NUM_WARM_UPS = 2
"""Steps that are not counted: DDP forms its buckets anew after the first, ZeRO-3 records its trace in it."""
_LIMITS = ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance", "prefetch_bucket_size")
RELEASED = {f"stage3_{name}": 0 for name in _LIMITS}
"""ZeRO-3 settings with which no weight stays whole between the layer that uses it and the next."""
_FIGURES = ("gathers", "gathered_bytes", "reductions", "sent_bytes", "all_ranks_alike")
COLUMNS = ("engine", "training", "variant", *_FIGURES)
NOTE = "In a step, of the first rank. Sent: by ring algorithms, gathers and reductions together."

Counts = dict[str, dict[str, int]]
"""By the kind of a collective: how many, and their bytes."""
Step = Callable[[Tensor], None]
"""Forward and backward, from ids (1, T), and what the engine's step has to do; gradients do not stay."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A step of one engine; `chunk_size` is `None` for the plain model."""

    engine: str
    variant: str
    chunk_size: int | None
    lora: bool

    @property
    def layers_per_group(self) -> int:
        return GROUP if self.engine == GROUP_UNITS else 1


def cases(num_tokens: int, chunk_size: int, *, has_deepspeed: bool, only: str = "") -> list[Case]:
    """What is run, by engine: full training and LoRA, plain, in one chunk, in many."""
    variants: dict[str, int | None] = {PLAIN: None, LEAVES: None, "1 chunk": num_tokens}
    variants[f"{-(-num_tokens // chunk_size)} chunks"] = chunk_size
    return [
        Case(engine=engine, variant=variant, chunk_size=size, lora=lora)
        for engine in ENGINES
        if only in engine and (has_deepspeed or not engine.startswith("ZeRO"))
        for lora in (False, True)
        for variant, size in variants.items()
        if engine == "ZeRO-3" or variant != LEAVES
    ]


def run_cases(
    rank: int, chosen: list[Case], sizes: Sizes, lengths: list[int], device_type: str, folder: Path
) -> None:
    """Runs every case on one rank, and writes its counts to `{rank}.json` in the empty folder in which the
    ranks meet. `lengths` are the tokens of each rank's sequence."""
    os.environ.update(LOCAL_RANK=f"{rank}", RANK=f"{rank}", WORLD_SIZE=f"{len(lengths)}")  # for DeepSpeed
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device("cpu")
    if device_type == "cuda":
        torch.cuda.set_device(device)
    else:
        os.environ["DS_ACCELERATOR"] = "cpu"
        torch.set_num_threads(1)
    distributed.init_process_group(
        "nccl" if device_type == "cuda" else "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=len(lengths),
        timeout=timedelta(minutes=2),
    )
    try:
        found = []
        for case in chosen:
            if rank == 0:
                report_progress(f"{case.engine}, {case.variant}")
            found.append(counts_of(case, replace(sizes, num_tokens=lengths[rank]), device))
        (folder / f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    finally:
        distributed.destroy_process_group()


def counts_of(case: Case, sizes: Sizes, device: torch.device) -> Counts:
    """The collectives of one step of this rank."""
    sizes = replace(sizes, lora_rank=8 if case.lora else 0)
    ids = sizes.tokens(str(device))
    model = sizes.model(str(device), torch.bfloat16 if device.type == "cuda" else torch.float32)
    causal_lm = model.get_base_model() if case.lora else model
    with ExitStack() as stack:
        if case.chunk_size is None:  # a chunked model has the tiled loss by itself
            stack.enter_context(lazy_logits(causal_lm))
        else:
            config = ChunkConfig(chunk_size=case.chunk_size, layers_per_group=case.layers_per_group)
            chunk_model(model, config)
        step = stack.enter_context(ENGINES[case.engine](case, model, causal_lm))
        for _ in range(NUM_WARM_UPS):
            step(ids)
        with CollectiveCounter() as counter:
            step(ids)
    return {kind: asdict(traffic) for kind, traffic in counter.by_kind.items()}


@contextmanager
def _ddp(case: Case, model: Any, causal_lm: Any) -> Iterator[Step]:
    ddp = nn.parallel.DistributedDataParallel(model)
    yield lambda ids: _forward_and_backward(ddp, ids)


@contextmanager
def _fsdp2(case: Case, model: Any, causal_lm: Any) -> Iterator[Step]:
    mesh = init_device_mesh(causal_lm.device.type, (distributed.get_world_size(),))
    layers, height = causal_lm.get_decoder().layers, case.layers_per_group
    for start in range(0, len(layers), height):
        unit = list(layers[start : start + height])
        fully_shard(unit if height > 1 else unit[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    yield lambda ids: _forward_and_backward(model, ids)


def _forward_and_backward(model: nn.Module, ids: Tensor) -> None:
    model(input_ids=ids, labels=ids).loss.backward()
    model.zero_grad(set_to_none=True)


@contextmanager
def _zero(case: Case, model: Any, causal_lm: Any) -> Iterator[Step]:
    import deepspeed
    from deepspeed.utils import set_z3_leaf_module

    from chunkdist.train.launch.ranks import skip_shm_build

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # it writes to stdout, where the table goes
    skip_shm_build()
    is_zero3 = case.engine == "ZeRO-3"
    if case.variant == LEAVES:  # as `chunk_model` makes them
        for layer in causal_lm.get_decoder().layers:
            set_z3_leaf_module(layer, True)
        if case.lora:  # a leaf reduces in a full backward hook, which wants an input that requires grad
            causal_lm.enable_input_require_grads()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": next(model.parameters()).dtype == torch.bfloat16},
        "zero_optimization": {"stage": 3 if is_zero3 else 2, **(RELEASED if is_zero3 else {})},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

    def step(ids: Tensor) -> None:
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()

    try:
        yield step
    finally:
        engine.destroy()


ENGINES: dict[str, Callable[[Case, Any, Any], AbstractContextManager[Step]]] = {
    "DDP": _ddp,
    "FSDP2": _fsdp2,
    GROUP_UNITS: _fsdp2,
    "ZeRO-2": _zero,
    "ZeRO-3": _zero,
}


def row_of(case: Case, by_rank: Sequence[Counts]) -> dict[str, Any]:
    """A case's row: the first rank's figures, whether all ranks have the same, and those by kind."""
    first = by_rank[0]
    return {
        "engine": case.engine,
        "training": "LoRA" if case.lora else "full",
        "variant": case.variant,
        "gathers": first.get("all-gather", {}).get("count", 0),
        "gathered_bytes": first.get("all-gather", {}).get("whole_bytes", 0),
        "reductions": sum(first[kind]["count"] for kind in ("reduce-scatter", "all-reduce") if kind in first),
        "sent_bytes": sum(traffic["sent_bytes"] for traffic in first.values()),
        "all_ranks_alike": all(found == first for found in by_rank),
        "by_kind": first,
    }


def main(arguments: Sequence[str]) -> int:
    """Runs the benchmark; returns the exit status."""
    names = ("model", "num-tokens", "chunk-size", "device", "only")
    parser = parser_of("sharding", "Gathers and bytes moved, by engine.", *names)
    parser.add_argument("--num-ranks", type=count, help="default: 2; with --device cuda, all GPUs")
    run = Run(parser, arguments)
    options, num_gpus = run.options, torch.cuda.device_count()
    if run.device not in ("cpu", "cuda"):
        parser.error(f"--device {run.device}: each rank has a device of its own: write cpu or cuda")
    num_ranks = options.num_ranks or (num_gpus if run.on_gpu else 2)
    if run.on_gpu and not 2 <= num_ranks <= num_gpus:
        parser.error(f"--device cuda: {num_ranks} ranks on {num_gpus} GPUs: 2 or more, each on its own")
    sizes = SIZES["smoke" if options.smoke else options.model]
    num_tokens = options.num_tokens or (sizes.num_tokens if run.on_gpu or options.smoke else 512)
    chunk_size = options.chunk_size or max(1, num_tokens // 8)
    has_deepspeed = importlib.util.find_spec("deepspeed") is not None
    chosen = cases(num_tokens, chunk_size, has_deepspeed=has_deepspeed, only=options.only)
    if not chosen:
        parser.error(f"--only {options.only}: no engine has it in its name, or DeepSpeed is not installed")
    lengths = [num_tokens, *[max(1, num_tokens // 2)] * (num_ranks - 1)]
    plain = replace(sizes, lora_rank=0).model("meta", run.dtype)
    run.result |= {
        "model": asdict(replace(sizes, num_tokens=num_tokens)),
        "num_ranks": num_ranks,
        "lengths": lengths,
        "chunk_size": chunk_size,
        "parameter_bytes": sum(parameter.nbytes for parameter in plain.parameters()),
    }
    with tempfile.TemporaryDirectory() as name:
        # Forked from a process that has imported torch and transformers, and has not touched CUDA.
        multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])
        given = (chosen, sizes, lengths, run.device, Path(name))
        start_processes(run_cases, given, nprocs=num_ranks, start_method="forkserver", daemon=True)
        files = [Path(name) / f"{rank}.json" for rank in range(num_ranks)]
        by_rank = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    run.rows += [row_of(case, found) for case, *found in zip(chosen, *by_rank, strict=True)]
    run.end()
    return 0
