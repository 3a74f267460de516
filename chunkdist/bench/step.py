"""The time and memory of a training step by length: chunked, and by each baseline, in one process.

A step is a forward with its loss and a backward, without the optimizer. All variants run on the same weights
and tokens, with flash attention and the same tiled loss, in turn, in an order that rotates
(`chunkdist.bench.rounds`): what disturbs the machine disturbs all of them. A ratio is the median of the
ratios of each round. A variant that runs out of memory, or fails, says so, and is left out at longer lengths;
the exit status is 1 when one has failed otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from chunkdist.bench.models import Sizes
from chunkdist.bench.options import count, parser_of, sizes_of
from chunkdist.bench.report import Run
from chunkdist.bench.rounds import OUT_OF_MEMORY, Rounds
from chunkdist.bench.timing import matmul_flops, report_progress, step_flops, times
from chunkdist.bench.variants import EXTRAS, Variant, baselines, chunked, extras

COLUMNS = (
    *("num_tokens", "variant", "outcome", "median_wall_s", "wall_ratio", "cpu_ratio", "mfu", "mfu_needed"),
    *("largest_gradient_difference", "peak_allocated_bytes", "peak_reserved_bytes", "num_reruns"),
)
NOTE = """Ratios: to the first variant, medians over rounds. Gradients: the largest relative difference of a
parameter's from the first variant that ran. MFU: model FLOPs (frozen weights too) at the rate of a large
matrix product; needed: without the gradients of frozen weights, which nobody computes. Peak, reserved: of the
warm-up, by tensors and with the allocator's cache. Steps run again: the allocator asked the device for
memory, as no step of a training loop does."""


def measure(sizes: Sizes, variants: Sequence[Variant], lengths: Sequence[int], run: Run) -> None:
    """Runs every variant at every length, in rounds; the result is written after each step.

    Args:
        lengths: Tokens, ascending.
    """
    sizes = replace(sizes, num_tokens=lengths[-1])
    model = sizes.model(run.device, run.dtype)
    rates = [matmul_flops(run.device, run.dtype)]
    run.result |= {"model": sizes.described(model), "baseline": variants[0].name, "matmul_flops": rates}
    names, left, lost = [variant.name for variant in variants], list(variants), dict[str, str]()
    for num_tokens in lengths:
        report_progress(f"{num_tokens:,} tokens")
        ids = replace(sizes, num_tokens=num_tokens).tokens(run.device)
        flops, rows_before = step_flops(model, num_tokens), list(run.rows)

        def changed(
            here: Rounds, flops: dict[str, int] = flops, rows_before: list[dict[str, Any]] = rows_before
        ) -> None:
            lost.update(here.lost)
            found = [{"variant": name, "outcome": why} for name, why in lost.items()]
            found += [_row(here, name, names[0], flops, rates[0]) for name in here.costs]
            found.sort(key=lambda row: names.index(row["variant"]))
            run.rows[:] = [*rows_before, *({"num_tokens": here.num_tokens, **row} for row in found)]
            run.save()

        here = Rounds(model, ids, left, changed)
        here.run(run.num_rounds)
        left = here.left
    with suppress(RuntimeError):  # the device may be lost
        rates.append(matmul_flops(run.device, run.dtype))
    for row in run.rows:  # a cold or throttled GPU would inflate it: of the faster rate, before or after
        row |= {key: row[key] * rates[0] / max(rates) for key in ("mfu", "mfu_needed") if key in row}


def _row(here: Rounds, name: str, baseline: str, flops: dict[str, int], rate: float) -> dict[str, Any]:
    """Medians and ratios of a variant that ran."""
    own, base = here.costs[name], here.costs.get(baseline, [])
    row = {"variant": name, "outcome": "ran", **here.warm_ups[name], **times(own, base)}
    return row | {
        "tokens_per_s": here.num_tokens / row["median_wall_s"],
        "mfu": flops["by_convention"] / row["median_wall_s"] / rate,
        "mfu_needed": flops["needed"] / row["median_wall_s"] / rate,
        "num_reruns": sum(cost.num_reruns for cost in own) or None,
    }


def main(arguments: Sequence[str]) -> int:
    """Runs the benchmark; returns the exit status."""
    names = ("model", "num-layers", "chunk-size", "repetitions", "device", "threads", "memory-gib")
    description = "Time and memory of a step, chunked and by each baseline."
    parser = parser_of("step", description, *names, "flash-impl", num_rounds=(7, 2))
    parser.add_argument("--num-tokens", type=count, nargs="+", help="lengths; default: the model's own")
    parser.add_argument("--chunk-sizes", type=count, nargs="+", default=[], help="others, with the defaults")
    parser.add_argument("--groups", type=count, nargs="+", default=[], help="groups of so many layers, too")
    parser.add_argument("--offload", action="store_true", help="host offload, too")
    kinds = ["all", *EXTRAS]
    parser.add_argument("--extras", nargs="+", default=[], choices=kinds, help="other kernels and dtypes")
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORD", help="variants with one of them")
    run = Run(parser, arguments)
    options, sizes = run.options, sizes_of(run.options)
    run.result["memory_gib"] = options.memory_gib
    if options.memory_gib is not None and not run.on_gpu:
        parser.error("--memory-gib limits a GPU's memory: leave it out, or write --device cuda")
    found = [
        *baselines(sizes.chunk_size, on_gpu=run.on_gpu),
        *chunked(sizes.chunk_size, options.offload, options.chunk_sizes, options.groups),
        *extras(options.extras, sizes.chunk_size, on_gpu=run.on_gpu),
    ]
    chosen = [variant for variant in found if any(word in variant.name for word in options.only)]
    if not chosen:
        parser.error(f"--only {' '.join(options.only)}: write words of {', '.join(v.name for v in found)}")
    measure(sizes, chosen, sorted(options.num_tokens or [sizes.num_tokens]), run)
    run.end()
    return 0 if all(row["outcome"] in ("ran", OUT_OF_MEMORY) for row in run.rows) else 1
