"""Host time of a cell, and the share of a step that is spent in kernels, by chunk size.

Steps are timed without the profiler, one more runs under it. *Kernels* are, on CUDA, what runs on the device;
on a CPU, torch's operators; what runs at the same time is counted once. *Host* is, on CUDA, the time until
all work is queued: as long as it is below the device's, the device does not wait. On a CPU it is the CPU time
of a step, which other programs on the machine hardly move, less the share that operators have of the step
under the profiler.
A cell is one layer on one chunk, run once; a step runs each twice, the second time with a backward.

    python -m chunkdist.bench.overhead [--smoke] [--json FILE] [--repetitions N] [--device cuda] [--model 8b]
        [--num-tokens N] [--num-layers N] [--chunk-sizes N ...]
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor
from torch.profiler import profile

from chunkdist import ChunkConfig
from chunkdist.bench.environment import provenance, write_partial, write_result
from chunkdist.bench.options import check_counts, dtype_on, parsed, parser_of
from chunkdist.bench.profile import gaps_of, kernels_of, recorded
from chunkdist.bench.python_time import python_shares
from chunkdist.bench.sizes import SIZES, Sizes
from chunkdist.bench.ways import BASELINE, Way, prepared

NUM_PROFILED = 5
"""Steps under the profiler on a CPU, where other programs disturb them."""


def kernel_seconds(step_profile: profile, *, on_gpu: bool) -> float:
    """In which at least one kernel runs, under the profiler."""
    return gaps_of(kernels_of(step_profile, on_gpu=on_gpu))[0]


def timed(model: Any, ids: Tensor, way: Way, num_rounds: int) -> dict[str, Any]:
    """Medians of seconds: of a step, of its CPU time, on the host, and in kernels; the kernels' share; on a
    CPU, whose Python the host runs."""
    on_gpu = ids.is_cuda
    walls, cpus, queued, profiled, kernels = [], [], [], [], list[float]()
    with prepared(model, way, on_gpu=on_gpu) as step:
        for number in range(num_rounds + 1):  # the first one warms up
            model.zero_grad(set_to_none=True)
            _wait(on_gpu)
            start, cpu_start = time.perf_counter(), time.process_time()
            step(ids)
            done = time.perf_counter()
            _wait(on_gpu)
            if number:
                walls.append(time.perf_counter() - start)
                cpus.append(time.process_time() - cpu_start)
                queued.append(done - start)
        for _ in range(1 if on_gpu else NUM_PROFILED):
            model.zero_grad(set_to_none=True)
            with profile(activities=recorded(on_gpu=on_gpu)) as step_profile:
                start = time.perf_counter()
                step(ids)
                _wait(on_gpu)
                profiled.append(time.perf_counter() - start)
            kernels.append(kernel_seconds(step_profile, on_gpu=on_gpu))
        model.zero_grad(set_to_none=True)
        shares = {} if on_gpu else {"python_shares": python_shares(lambda: step(ids))}
    wall_s, cpu_s = statistics.median(walls), statistics.median(cpus)
    kernel_s = statistics.median(kernels)
    of_profiled = statistics.median(own_s / all_s for own_s, all_s in zip(kernels, profiled, strict=True))
    share = kernel_s / wall_s if on_gpu else of_profiled
    host_s = statistics.median(queued) if on_gpu else cpu_s * (1 - share)
    seconds = {"wall_s": wall_s, "cpu_s": cpu_s, "host_s": host_s, "kernel_s": kernel_s}
    return {**seconds, "kernel_share": share, **shares}


def _wait(on_gpu: bool) -> None:
    if on_gpu:
        torch.cuda.synchronize()


def measure(
    sizes: Sizes,
    chunk_sizes: Sequence[int],
    *,
    device: str,
    dtype: torch.dtype,
    num_rounds: int,
    write: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """What the JSON holds: by chunk size, and of gradient checkpointing, which runs each layer twice, too.

    `write` is called after each row, with what there is so far.
    """
    model = sizes.model(device, dtype)
    ids = sizes.tokens(device)
    ways = [(sizes.num_tokens, Way(name=BASELINE))]
    ways += [
        (size, Way(name=f"chunks of {size:,}", config=ChunkConfig(chunk_size=size))) for size in chunk_sizes
    ]
    rows: list[dict[str, Any]] = []
    result = {"model": {**asdict(sizes), "num_parameters": model.num_parameters()}, "rows": rows}
    for chunk_size, way in ways:
        num_cells = 2 * sizes.num_layers * -(-sizes.num_tokens // chunk_size)
        found = timed(model, ids, way, num_rounds)
        rows.append(
            {
                "way": way.name,
                "chunk_size": chunk_size,
                "num_cells": num_cells,
                **found,
                "host_s_per_cell": found["host_s"] / num_cells,
            }
        )
        write(result)
    return result


def table(result: dict[str, Any]) -> str:
    """The rows, for people to read."""
    model = result["model"]
    lines = [
        f"Llama of {model['num_parameters'] / 1e6:.1f}M parameters, {model['num_tokens']:,} tokens",
        f"{'':28}{'cells':>8}{'step':>11}{'CPU':>11}{'host':>11}{'host a cell':>14}{'in kernels':>12}",
    ]
    for row in result["rows"]:
        lines.append(
            f"{row['way']:28}{row['num_cells']:8,}{row['wall_s']:9.3f} s"
            f"{row['cpu_s']:9.3f} s{row['host_s']:9.3f} s"
            f"{row['host_s_per_cell'] * 1e3:11.2f} ms{row['kernel_share']:12.1%}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = parser_of(
        *("overhead", "Host time of a cell, and the share of kernels."),
        *("model", "repetitions", "device", "threads", "flash-impl", "num-layers"),
        num_rounds=(5, 1),
    )
    parser.add_argument("--num-tokens", type=int, help="tokens of the sequence; default: the model's own")
    parser.add_argument("--chunk-sizes", type=int, nargs="+", help="default: 1, 1/2 and 1/4 of the model's")
    options = parsed(parser, given)
    check_counts(parser, options, "chunk_sizes")
    sizes = SIZES["smoke" if options.smoke else options.model]
    sizes = replace(
        sizes,
        num_tokens=options.num_tokens or sizes.num_tokens,
        num_layers=options.num_layers or sizes.num_layers,
    )
    head = {
        **provenance("overhead", given, device=options.device),
        "num_repetitions": options.repetitions,
    }
    found = measure(
        sizes,
        options.chunk_sizes or [sizes.chunk_size // part for part in (1, 2, 4)],
        device=options.device,
        dtype=dtype_on(options.device),
        num_rounds=options.repetitions,
        write=lambda found: write_partial({**head, **found}, options.json),
    )
    write_result({**head, **found}, options.json)
    print(table({**head, **found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
