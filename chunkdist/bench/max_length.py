"""The longest sequence whose training step fits a given memory, by bisection, on CUDA.

Each trial is a whole step under a limit of the allocator, and running out of memory is an answer. Lengths are
doubled until one does not fit, then bisected. A search that runs out of time says so: what it gives as the
longest fits, and a longer one may fit, too. Without a GPU, `chunkdist plan` predicts the longest length.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

from chunkdist.bench.models import Sizes
from chunkdist.bench.options import count, parser_of, sizes_of
from chunkdist.bench.report import Run
from chunkdist.bench.rounds import OUT_OF_MEMORY, attempt
from chunkdist.bench.timing import report_progress
from chunkdist.bench.variants import BASELINE, OFFLOADED, ONE_GROUP, REBUILT, Variant, baselines, chunked

PRECISION = 16
"""The bisection ends when the interval is at most 1 / 16 of its lower end."""
NAMES = (BASELINE, ONE_GROUP, REBUILT, OFFLOADED)
COLUMNS = ("variant", "fits", "fails", "out_of_time")
NOTE = "Tokens of a sequence in one step of training; out of time: a longer one may fit, too."


def longest(
    fits: Callable[[int], bool], *, start: int, step: int, limit: int, is_late: Callable[[], bool]
) -> Iterator[dict[str, Any]]:
    """Searches the longest multiple of `step` up to `limit` that fits, to 1 / 16 of it, if a shorter one fits
    whenever a longer one does. After each trial, gives what is known: the longest that fits (0: none that was
    tried), the shortest that does not (`None`: all that were tried fit), and whether the search goes on."""
    high: int | None = None
    low, limit = 0, limit // step * step
    length = max(step, min(start, limit) // step * step)
    while not is_late():
        if fits(length):
            low = length
        else:
            high = length
        ends = low >= limit if high is None else high - low <= max(step, low // PRECISION)
        yield {"fits": low, "fails": high, "out_of_time": not ends}
        if ends:
            return
        length = min(2 * low, limit) if high is None else (low + high) // 2 // step * step


def search(model: Any, sizes: Sizes, variant: Variant, run: Run, *, start: int, limit: int) -> None:
    """Adds a variant's row, which is written anew after each trial."""
    deadline, num_before = time.perf_counter() + run.options.seconds, len(run.rows)

    def fits(num_tokens: int) -> bool:
        ids = replace(sizes, num_tokens=num_tokens).tokens(run.device)
        _, why_not = attempt(model, ids, variant, is_timed=False)
        if why_not not in (None, OUT_OF_MEMORY):
            raise RuntimeError(f"{variant.name}, {num_tokens:,} tokens: {why_not}")
        return why_not is None

    bounds = {"start": start, "step": sizes.chunk_size, "limit": limit}
    for found in longest(fits, **bounds, is_late=lambda: time.perf_counter() > deadline):
        report_progress(f"{variant.name}: {found['fits']:,} fits, {found['fails']} does not")
        run.rows[num_before:] = [{"variant": variant.name, **found}]
        run.save()


def main(arguments: Sequence[str]) -> int:
    """Runs the benchmark; returns the exit status."""
    names = ("model", "device", "memory-gib", "flash-impl", "chunk-size", "only")
    parser = parser_of("max-length", "The longest sequence that fits, on CUDA.", *names)
    parser.set_defaults(model="8b", memory_gib=24.0)
    whole: dict[str, Any] = {"dest": "memory_gib", "action": "store_const", "const": None}
    parser.add_argument("--whole-card", **whole, help="all of the GPU's memory, not 24 GiB")
    parser.add_argument("--start", type=count, default=8192, help="tokens tried first; default: 8,192")
    parser.add_argument("--limit", type=count, default=2**20, help="no more are tried; default: 1,048,576")
    parser.add_argument("--seconds", type=float, default=120.0, help="for each variant; default: 120")
    run = Run(parser, arguments)
    options, sizes = run.options, sizes_of(run.options)
    if not (run.on_gpu or options.smoke):
        parser.error("without a GPU nothing runs out of memory: write --device cuda, or see chunkdist plan")
    if not 0 < options.seconds < math.inf:
        parser.error(f"--seconds {options.seconds:g}: write a number above 0")
    start, limit = (32, 64) if options.smoke else (options.start, options.limit)
    if limit < sizes.chunk_size:
        parser.error(f"--limit {limit} is less than a chunk: write {sizes.chunk_size} or more")
    known = [*baselines(sizes.chunk_size, on_gpu=False), *chunked(sizes.chunk_size, offload=True)]
    chosen = [v for v in known if v.name in NAMES and options.only in v.name]
    if not chosen:
        parser.error(f"--only {options.only}: no variant has it in its name")
    run.result |= {"memory_gib": options.memory_gib, "model": asdict(sizes)}
    model = replace(sizes, num_tokens=limit).model(run.device, run.dtype)
    for variant in chosen:
        search(model, sizes, variant, run, start=start, limit=limit)
    run.end()
    return 0
