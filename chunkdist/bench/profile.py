"""One training step under torch's profiler: a trace for chrome://tracing or Perfetto, the kernels that take
most of the time, and the gaps between kernels.

*Kernels* are, on CUDA, what runs on the device, copies too; on a CPU, torch's operators, an operator inside
another one not counted again. A gap is time between the first and the last of them in which none runs, on any
stream: the device waits for the host. The profiler makes the host slower, so gaps are upper bounds; the step
without it is timed, too. On CUDA the host's operators, a million of them in a large step, are not recorded.

    python -m chunkdist.bench.profile [--smoke] [--json FILE] [--trace FILE] [--device cuda] [--model 8b]
        [--num-tokens N] [--num-layers N] [--chunk-size N]
        [--layers-per-group N] [--checkpointing] [--top N]
"""

from __future__ import annotations

import bisect
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from chunkdist import ChunkConfig
from chunkdist.bench.environment import provenance, write_result
from chunkdist.bench.options import check_counts, dtype_on, parsed, parser_of
from chunkdist.bench.sizes import SIZES
from chunkdist.bench.timing import cost_of, seconds_of
from chunkdist.bench.ways import BASELINE, Way, prepared

GAP_LIMITS_S = (10e-6, 100e-6, 1e-3, 10e-3)
"""Gaps are counted by length: up to the first, up to the second, ..., longer than the last."""

NUM_LONGEST = 5
"""Gaps that are listed with what ran before and after."""


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A run of one kernel or operator, from `start_s` to `end_s`."""

    name: str
    start_s: float
    end_s: float


@dataclass(frozen=True, kw_only=True)
class Gap:
    """A time without any kernel; `before` is the one that ended last, `after` the one that begins."""

    seconds: float
    before: str
    after: str


def recorded(*, on_gpu: bool) -> list[ProfilerActivity]:
    """Not the operators of a GPU's step: to read a million of them takes minutes."""
    return [ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]


def kernels_of(step_profile: profile, *, on_gpu: bool) -> list[Kernel]:
    """What ran under the profiler, by start."""
    wanted = "CUDA" if on_gpu else "CPU"
    found = []
    for event in step_profile.events() or ():
        is_operator = event.name.startswith(("aten::", "chunkdist::"))
        if event.device_type.name == wanted and not event.is_user_annotation and (on_gpu or is_operator):
            start, end = event.time_range.start / 1e6, event.time_range.end / 1e6
            found.append(Kernel(name=event.name, start_s=start, end_s=end))
    return sorted(found, key=lambda kernel: (kernel.start_s, -kernel.end_s))


def gaps_of(kernels: Sequence[Kernel]) -> tuple[float, list[Gap]]:
    """Seconds in which at least one kernel runs, and the gaps between them.

    Args:
        kernels: By start; they may overlap.
    """
    busy_s, gaps = 0.0, []
    last: Kernel | None = None
    for kernel in kernels:
        if last is None or kernel.start_s >= last.end_s:
            if last is not None and kernel.start_s > last.end_s:
                gaps.append(Gap(seconds=kernel.start_s - last.end_s, before=last.name, after=kernel.name))
            busy_s += kernel.end_s - kernel.start_s
            last = kernel
        elif kernel.end_s > last.end_s:
            busy_s += kernel.end_s - last.end_s
            last = kernel
    return busy_s, gaps


def outermost(kernels: Iterable[Kernel]) -> list[Kernel]:
    """Without operators that run inside another one, on one thread."""
    found: list[Kernel] = []
    for kernel in kernels:
        if not found or kernel.end_s > found[-1].end_s:
            found.append(kernel)
    return found


def by_length(gaps: Sequence[Gap]) -> list[dict[str, Any]]:
    """How many gaps of each length there are, and their seconds together."""
    rows = [{"up_to_s": limit, "count": 0, "seconds": 0.0} for limit in (*GAP_LIMITS_S, None)]
    for gap in gaps:
        row = rows[bisect.bisect_left(GAP_LIMITS_S, gap.seconds)]
        row["count"] += 1  # type: ignore[operator]
        row["seconds"] += gap.seconds  # type: ignore[operator]
    return rows


def most_time(kernels: Sequence[Kernel], num: int) -> list[dict[str, Any]]:
    """The names that take most of the time, with their number of runs."""
    totals: dict[str, list[float]] = {}
    for kernel in kernels:
        totals.setdefault(kernel.name, []).append(kernel.end_s - kernel.start_s)
    all_s = sum(map(sum, totals.values()))
    rows = [
        {"name": name, "count": len(runs), "seconds": sum(runs), "share": sum(runs) / all_s}
        for name, runs in totals.items()
    ]
    return sorted(rows, key=lambda row: -row["seconds"])[:num]  # type: ignore[operator]


def measure(step: Callable[[], Any], *, on_gpu: bool, trace: Path, num_kernels: int) -> dict[str, Any]:
    """Runs a step to warm up, times one, and runs one under the profiler, which writes `trace`.

    Shares are of seconds in which at least one kernel runs, whatever the stream. Kernels run under the
    profiler, so their share of the step without it may come out above 1: then it says that the profiler has
    made them slower.
    """
    step()
    wall_s = cost_of(step, on_gpu=on_gpu).wall_s
    with profile(activities=recorded(on_gpu=on_gpu)) as step_profile:
        profiled_s, _ = seconds_of(step, on_gpu=on_gpu)
    step_profile.export_chrome_trace(str(trace))
    kernels = kernels_of(step_profile, on_gpu=on_gpu)
    if not kernels:
        raise RuntimeError(
            "the profiler has seen no kernel: on CUDA it needs CUPTI, which another profiler may hold"
        )
    kernels = kernels if on_gpu else outermost(kernels)
    busy_s, gaps = gaps_of(kernels)
    longest = sorted(gaps, key=lambda gap: -gap.seconds)[:NUM_LONGEST]
    return {
        "wall_s": wall_s,
        "profiled_s": profiled_s,
        "kernel_s": busy_s,
        "kernel_share": busy_s / wall_s,
        "kernel_share_profiled": busy_s / profiled_s,
        "num_kernels": len(kernels),
        "top": most_time(kernels, num_kernels),
        "gaps": by_length(gaps),
        "longest_gaps": [asdict(gap) for gap in longest],
    }


def table(result: dict[str, Any]) -> str:
    """The figures, for people to read."""
    what = "kernels" if "gpu" in result["hardware"] else "operators"
    lines = [
        f"{result['way']}, {result['model']['num_tokens']:,} tokens: a step of {result['wall_s']:.3f} s, "
        f"under the profiler {result['profiled_s']:.3f} s",
        f"{result['num_kernels']:,} {what}, {result['kernel_s']:.3f} s: {result['kernel_share']:.1%} of the "
        f"step, {result['kernel_share_profiled']:.1%} of it under the profiler",
        "",
        f"{what + ' by time':72}{'runs':>8}{'seconds':>10}{'share':>8}",
    ]
    for row in result["top"]:
        lines.append(f"{row['name'][:70]:72}{row['count']:8,}{row['seconds']:10.4f}{row['share']:8.1%}")
    lines += ["", f"{'gaps between ' + what:72}{'gaps':>8}{'seconds':>10}{'share':>8}"]
    for row in result["gaps"]:
        longest = row["up_to_s"] is None
        name = (
            f"longer than {GAP_LIMITS_S[-1] * 1e6:,.0f} us"
            if longest
            else f"to {row['up_to_s'] * 1e6:,.0f} us"
        )
        share = row["seconds"] / result["profiled_s"]
        lines.append(f"{name:72}{row['count']:8,}{row['seconds']:10.4f}{share:8.1%}")
    lines += ["", "longest gaps"]
    for gap in result["longest_gaps"]:
        lines.append(f"{gap['seconds'] * 1e3:10.3f} ms  {gap['before'][:46]} -> {gap['after'][:46]}")
    return "\n".join([*lines, "", f"trace: {result['trace']} (chrome://tracing, ui.perfetto.dev)"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = parser_of(
        *("profile", "A trace of a step, its kernels, its gaps."),
        *("model", "device", "threads", "flash-impl", "num-layers"),
    )
    parser.add_argument("--num-tokens", type=int, help="tokens of the sequence; default: the model's own")
    parser.add_argument("--chunk-size", type=int, help="tokens of a chunk; default: the model's own")
    parser.add_argument("--layers-per-group", type=int, default=1, help="default: 1")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing, not chunks")
    parser.add_argument("--top", type=int, default=15, help="kernels that are printed; default: 15")
    parser.add_argument(
        "--trace",
        type=Path,
        default=Path("trace.json"),
        metavar="FILE",
        help="where the trace goes, compressed where it ends in .gz; default: trace.json",
    )
    options = parsed(parser, given)
    check_counts(parser, options, "layers_per_group", "top")
    sizes = SIZES["smoke" if options.smoke else options.model]
    sizes = replace(
        sizes,
        num_tokens=options.num_tokens or sizes.num_tokens,
        num_layers=options.num_layers or sizes.num_layers,
    )
    chunk_size = options.chunk_size or sizes.chunk_size
    config = ChunkConfig(chunk_size=chunk_size, layers_per_group=options.layers_per_group)
    way = (
        Way(name=BASELINE) if options.checkpointing else Way(name=f"chunks of {chunk_size:,}", config=config)
    )
    if not options.trace.resolve().parent.is_dir():
        parser.error(f"--trace {options.trace}: its folder does not exist: make it first")
    result = {**provenance("profile", given, device=options.device), "trace": str(options.trace)}
    on_gpu = options.device.startswith("cuda")
    model, ids = sizes.model(options.device, dtype_on(options.device)), sizes.tokens(options.device)
    with prepared(model, way, on_gpu=on_gpu) as step:

        def whole_step() -> None:
            model.zero_grad(set_to_none=True)
            step(ids)

        found = measure(whole_step, on_gpu=on_gpu, trace=options.trace, num_kernels=options.top)
    result |= {"model": {**asdict(sizes), "num_parameters": model.num_parameters()}, "way": way.name, **found}
    print(table(result))
    write_result(result, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
