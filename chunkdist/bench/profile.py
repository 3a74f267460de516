"""One training step under torch's profiler: a trace for chrome://tracing or Perfetto, and the top kernels.

*Kernels* are, on CUDA, what runs on the device, copies too; on a CPU, torch's operators, without those inside
them. What is left of a step is time in which the device waits for the host (on several streams kernels
overlap: then their sum is larger). The profiler makes the host slower; the step without it is timed, too.
The gaps themselves are in the trace.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from chunkdist import ChunkConfig
from chunkdist.bench.options import count, parser_of, sizes_of
from chunkdist.bench.report import Run
from chunkdist.bench.timing import cost_of
from chunkdist.bench.variants import BASELINE, Variant, prepared

COLUMNS = ("kernel", "count", "seconds", "share")
NOTE = "Share: of the time in all kernels. The trace opens in chrome://tracing or ui.perfetto.dev."


def measure(step: Callable[[], Any], run: Run, trace: Path, num_kernels: int) -> None:
    """Runs a step to warm up, times one, and runs one under the profiler, which writes `trace`."""
    on_gpu = run.on_gpu
    step()
    wall_s = cost_of(step).wall_s
    # To read the host's operators of a GPU's step, a million of them, takes minutes.
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with profile(activities=[activity]) as found:
        profiled_s = cost_of(step, max_reruns=0).wall_s
    found.export_chrome_trace(str(trace))
    own_us = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    kernels = [
        {"kernel": event.key, "count": event.count, "seconds": getattr(event, own_us) / 1e6}
        for event in found.key_averages()
        if (on_gpu or event.key.startswith(("aten::", "chunkdist::")))
        and not event.is_user_annotation
        and getattr(event, own_us) > 0
    ]
    if not kernels:
        raise RuntimeError(
            "the profiler has seen no kernel: on CUDA it needs CUPTI, which another profiler may hold"
        )
    kernel_s = sum(row["seconds"] for row in kernels)
    run.result |= {
        "wall_s": wall_s,
        "profiled_s": profiled_s,
        "kernel_s": kernel_s,
        "kernel_share": kernel_s / wall_s,
        "num_kernels": sum(row["count"] for row in kernels),
    }
    for row in sorted(kernels, key=lambda row: -float(row["seconds"]))[:num_kernels]:
        run.add(**row, share=row["seconds"] / kernel_s)


def main(arguments: Sequence[str]) -> int:
    """Runs the benchmark; returns the exit status."""
    names = ("model", "num-tokens", "num-layers", "chunk-size", "device", "threads", "flash-impl")
    parser = parser_of("profile", "A trace of a step, and its kernels.", *names)
    parser.add_argument("--layers-per-group", type=count, default=1, help="default: 1")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing, not chunks")
    parser.add_argument("--top", type=count, default=15, help="kernels that are printed; default: 15")
    trace: dict[str, Any] = {"type": Path, "default": Path("trace.json"), "metavar": "FILE"}
    parser.add_argument("--trace", **trace, help="where it goes; .gz: compressed; default: trace.json")
    run = Run(parser, arguments)
    options, sizes = run.options, sizes_of(run.options)
    if not options.trace.resolve().parent.is_dir():
        parser.error(f"--trace {options.trace}: its folder does not exist: make it first")
    config = ChunkConfig(chunk_size=sizes.chunk_size, layers_per_group=options.layers_per_group)
    variant = Variant(name=f"chunks of {sizes.chunk_size:,}", config=config)
    if options.checkpointing:
        variant = Variant(name=BASELINE)
    model, ids = sizes.model(run.device, run.dtype), sizes.tokens(run.device)
    run.result |= {"model": sizes.described(model), "variant": variant.name, "trace": str(options.trace)}
    with prepared(model, variant, on_gpu=run.on_gpu) as step:

        def whole_step() -> None:
            model.zero_grad(set_to_none=True)
            step(ids)

        measure(whole_step, run, options.trace, options.top)
    run.end()
    found = run.result
    print(
        f"\n{variant.name}: a step of {found['wall_s']:.3f} s, with the profiler {found['profiled_s']:.3f} s"
    )
    print(f"{found['num_kernels']:,} kernels, {found['kernel_s']:.3f} s ({found['kernel_share']:.1%})")
    return 0
