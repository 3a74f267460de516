"""Long-tailed data: the time of an epoch on token streams against padded batches and TRL's packing, and how
even the streams are over many ranks.

*Timed*: forward and backward of all sequences of a scaled-down sample (`chunkdist.data.long_tail`), without
the optimizer, in turn, in one process: the same weights, tokens, tiled loss and flash kernel. The ways differ
in what a micro-batch is:

- token streams: global batches joined to streams no longer than the longest sequence;
- padded: so many rows in the order of a shuffled epoch, padded to the longest of them, every layer recomputed
  (Hugging Face's gradient checkpointing); 8 rows are the default of `TrainingArguments`. Padding is on the
  right and causal attention never sees it: no mask is made, which is faster than what users have;
- TRL's packing (`bfd`): rows no longer than the longest sequence, one at a time, every layer recomputed. TRL
  truncates what is longer than `max_length`, which here is nothing.

*Simulated*: global batches of the whole sample over 8 and 64 ranks, with the cost of Llama-3-8B.

    python -m chunkdist.bench.long_tail [--smoke] [--json FILE] [--repetitions N] [--threads N]
        [--device cuda] [--model 1b] [--without-simulation]
    python -m chunkdist.bench.long_tail --simulation-only --json FILE   # replaces this part of FILE
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from chunkdist import chunk_model, unchunk_model
from chunkdist.bench.environment import provenance, write_partial, write_result
from chunkdist.bench.largest import largest
from chunkdist.bench.long_tail_simulation import simulate
from chunkdist.bench.long_tail_ways import (
    BASELINE,
    BATCH_SEQUENCES,
    PADDED_FLASH,
    SEGMENT_FLASH,
    SIZES,
    Sizes,
    Way,
    ways,
)
from chunkdist.bench.options import dtype_on, parsed, parser_of
from chunkdist.bench.timing import cost_of
from chunkdist.bench.ways import set_checkpointing
from chunkdist.chunking import chunk_report
from chunkdist.data.cost import SequenceCost
from chunkdist.data.long_tail import long_tailed_lengths
from chunkdist.data.streams import NO_LABEL, stream_of
from chunkdist.loss.lazy_logits import lazy_logits


def measure(
    sizes: Sizes,
    *,
    num_rounds: int,
    report: Callable[[str], None],
    write: Callable[[dict[str, Any]], None],
    device: str = "cpu",
) -> dict[str, Any]:
    """Every way once a round, in an order that rotates; returns what the JSON holds of it. `write` is called
    after each, with what there is so far.

    The gradients of a way's first epoch are compared with the baseline's: a fast wrong step is no step.
    """
    lengths = [max(2, n) for n in long_tailed_lengths(sizes.num_sequences, divisor=sizes.divisor)]
    model = _model(sizes, max(lengths)).to(device, dtype_on(device))
    generator = torch.Generator().manual_seed(1)
    samples = []
    for length in lengths:
        ids = torch.randint(0, sizes.vocab_size, (length,), generator=generator)
        samples.append({"input_ids": ids, "labels": torch.cat([ids[:1] * 0 + NO_LABEL, ids[1:]])})
    num_items = sum(length - 1 for length in lengths)
    contenders = ways(sizes, samples, SequenceCost.of(model), device=device)
    for way in contenders:  # the kernels have run before anything is timed, and the cache has the most room
        longest = max(way.micro_batches, key=lambda inputs: inputs["input_ids"].numel())
        _epoch(model, Way(name="", micro_batches=[longest], config=way.config), num_items)
    expected: dict[str, Tensor] = {}
    rows: dict[str, dict[str, Any]] = {}
    epochs: dict[str, list[_Epoch]] = {way.name: [] for way in contenders}
    result: dict[str, Any] = {
        "model": {
            **asdict(sizes),
            "num_parameters": model.num_parameters(),
            "dtype": str(model.dtype).removeprefix("torch."),
        },
        "data": {
            "num_sequences": len(lengths),
            "num_tokens": sum(lengths),
            "longest": max(lengths),
            "median": statistics.median(lengths),
            "batch_sequences": BATCH_SEQUENCES,
        },
        "baseline": BASELINE,
        "summary": rows,
    }
    for number in range(num_rounds):
        shift = number % len(contenders)
        for way in contenders[shift:] + contenders[:shift]:
            report(f"round {number + 1} of {num_rounds}: {way.name}")
            epoch = _epoch(model, way, num_items)
            epochs[way.name].append(epoch)
            if number == 0:
                grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
                expected = expected or grads
                rows[way.name] = {
                    **_counts(way, sizes.chunk_size, epoch),
                    "largest_gradient_difference": largest(
                        float((grads[name] - expected[name]).norm() / expected[name].norm())
                        for name in expected
                    ),
                }
            for name, row in rows.items():
                row |= _times(epochs[name], epochs[BASELINE])
            write(result)
    return result


def _times(epochs: Sequence[_Epoch], base_epochs: Sequence[_Epoch]) -> dict[str, Any]:
    """Of one way; ratios over the rounds that both have: the last one may not have ended."""
    num_asked = sum(epoch.num_device_allocations for epoch in epochs)
    found: dict[str, Any] = {"num_device_allocations": num_asked}
    for clock in ("wall_s", "cpu_s"):
        own, base = ([getattr(epoch, clock) for epoch in each] for each in (epochs, base_epochs))
        ratios = [slow / max(fast, 1e-9) for slow, fast in zip(base, own, strict=False)]
        short = clock.removesuffix("_s")
        found |= {clock: own, f"median_{clock}": statistics.median(own)}
        found |= {f"{short}_speedup": statistics.median(ratios), f"{short}_speedup_lowest": min(ratios)}
    return found


def _model(sizes: Sizes, longest: int) -> Any:
    config = LlamaConfig(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.num_heads,
        num_key_value_heads=sizes.num_heads,
        max_position_embeddings=longest,
        use_cache=False,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=SEGMENT_FLASH).train()


@dataclass(frozen=True, kw_only=True)
class _Epoch:
    """Times (CPU: of all threads of the process), how often the allocator asked the device for memory, and
    how many chunks of a stream were retained."""

    wall_s: float
    cpu_s: float
    num_device_allocations: int
    retained: int = 0


def _epoch(model: Any, way: Way, num_items: int) -> _Epoch:
    if way.config is None:
        model.set_attn_implementation(SEGMENT_FLASH if way.is_packed else PADDED_FLASH)
        set_checkpointing(model, True)
    else:
        chunk_model(model, way.config)

    def all_micro_batches() -> None:
        model.zero_grad(set_to_none=True)
        for inputs in way.micro_batches:
            with (
                lazy_logits(model) if way.config is None else nullcontext()
            ):  # a chunked model does it itself
                model(**inputs, num_items_in_batch=num_items).loss.backward()

    # An epoch of many lengths asks for memory here and there, in training too; another one takes too long.
    cost = cost_of(all_micro_batches, on_gpu=model.device.type == "cuda", max_reruns=0)
    retained = 0
    if way.config is None:
        set_checkpointing(model, False)
    else:
        retained = chunk_report(model).retained_chunks
        unchunk_model(model)
    return _Epoch(
        wall_s=cost.wall_s,
        cpu_s=cost.cpu_s,
        num_device_allocations=cost.num_device_allocations,
        retained=retained,
    )


def _counts(way: Way, chunk_size: int, epoch: _Epoch) -> dict[str, Any]:
    computed = sum(inputs["input_ids"].numel() for inputs in way.micro_batches)
    recomputed = computed
    if way.config is not None:
        recomputed = 0
        for inputs in way.micro_batches:
            starts = (inputs["position_ids"][0] == 0).nonzero().flatten().tolist()
            ends = [*starts[1:], inputs["input_ids"].shape[1]]
            stream = stream_of([end - start for start, end in zip(starts, ends, strict=True)], chunk_size)
            kept = stream.retained(epoch.retained)
            recomputed += sum(c.num_tokens for index, c in enumerate(stream.chunks) if index not in kept)
    return {
        "num_micro_batches": len(way.micro_batches),
        "tokens_computed": computed,
        "tokens_padded": way.num_padded,
        "tokens_recomputed": recomputed,
        "retained_chunks": epoch.retained,
    }


def table(result: dict[str, Any]) -> str:
    """The summary, for people to read."""
    data, model = result["data"], result["model"]
    lines = [
        f"Llama of {model['num_parameters'] / 1e6:.1f}M parameters, {data['num_sequences']:,} sequences of "
        f"{data['num_tokens']:,} tokens (median {data['median']:,.0f}, longest {data['longest']:,}), "
        f"{result['num_repetitions']} round(s)",
        "",
        f"{'':34}{'wall time':>11}{'speedup':>9}{'CPU time':>11}{'speedup':>9}{'padded':>10}"
        f"{'recomputed':>12}{'gradients':>11}",
    ]
    for way, row in result["summary"].items():
        lines.append(
            f"{way:34}{row['median_wall_s']:9.2f} s{row['wall_speedup']:8.2f}x"
            f"{row['median_cpu_s']:9.2f} s{row['cpu_speedup']:8.2f}x{row['tokens_padded']:10,}"
            f"{row['tokens_recomputed']:12,}{row['largest_gradient_difference']:11.1e}"
        )
    lines += ["", f"speedup: over {result['baseline']}; padded and recomputed: tokens", ""]
    simulation = result["simulation"]
    return "\n".join([*lines, *([] if simulation is None else [simulation_table(simulation)])])


def simulation_table(simulation: dict[str, Any]) -> str:
    """The simulation, for people to read."""
    lines = [
        "Simulated, cost of Llama-3-8B:",
        f"{'ranks':>6}{'batch':>7}{'longest':>9}{'chunk':>7}{'imbalance':>11}{'over bound':>12}"
        f"{'empty slots':>13}{'at best':>9}",
    ]
    for row in simulation["rows"]:
        even = "-" if row["largest_imbalance"] is None else f"{row['largest_imbalance']:.3f}"
        lines.append(
            f"{row['num_ranks']:6}{row['batch_sequences']:7,}{row['longest']:9,}{row['chunk_size']:7,}"
            f"{even:>11}{row['largest_over_bound']:12.3f}{row['empty_share']:13.2%}"
            f"{row['empty_share_at_best']:9.2%}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = parser_of(
        *("long-tail", "An epoch of long-tailed data, by how it is batched."),
        *("repetitions", "threads", "device"),
        num_rounds=(2, 1),
    )
    parser.add_argument("--model", choices=["3m", "1b"], default="3m", help="default: 3m")
    parser.add_argument("--without-simulation", action="store_true", help="measure only")
    parser.add_argument(
        "--simulation-only",
        action="store_true",
        help="measure nothing; replace the simulation in --json FILE",
    )
    options = parsed(parser, given)
    num_rounds = options.repetitions
    if options.simulation_only and options.without_simulation:
        parser.error("--simulation-only and --without-simulation leave nothing: write one of them")
    simulation = None
    if not options.without_simulation:
        print("simulation", file=sys.stderr)
        simulation = simulate(max_batches=2 if options.smoke else None)
    if options.simulation_only:
        assert simulation is not None
        print(simulation_table(simulation))
        if options.json is not None:
            measured = json.loads(options.json.read_text(encoding="utf-8"))
            write_result({**measured, "simulation": simulation}, options.json)
        return 0
    head = {
        **provenance("long-tail", given, device=options.device),
        "num_repetitions": num_rounds,
        "simulation": simulation,
    }
    found = measure(
        SIZES["smoke" if options.smoke else options.model],
        device=options.device,
        num_rounds=num_rounds,
        report=lambda line: print(line, file=sys.stderr, flush=True),
        write=lambda found: write_partial({**head, **found}, options.json),
    )
    result = {**head, **found}
    print(table(result))
    write_result(result, options.json)
    return (
        1 if any(math.isnan(row["largest_gradient_difference"]) for row in found["summary"].values()) else 0
    )


if __name__ == "__main__":
    sys.exit(main())
