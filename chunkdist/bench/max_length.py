"""The longest sequence whose training step fits a given memory, by bisection.

On CUDA, each trial is a whole step under a limit of the allocator, and running out of memory is an answer.
Without a GPU, a trial counts the live bytes of the same step under fake tensors, as `chunkdist.bench.memory`
does, and adds the weights; kernels' scratch space and the allocator's rounding come on top of that.
Lengths are doubled until one does not fit, then bisected. A search that runs out of time says so: what it
gives as the longest fits, and a longer one may fit, too.

    python -m chunkdist.bench.max_length [--smoke] [--json FILE] [--device cuda] [--model 8b]
        [--memory-gib 24] [--whole-card] [--chunk-size N] [--only WORD] [--start N] [--limit N] [--seconds S]
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from chunkdist import ChunkConfig
from chunkdist.bench import memory
from chunkdist.bench.environment import provenance, write_partial, write_result
from chunkdist.bench.options import check_counts, dtype_on, limit_memory, parsed, parser_of
from chunkdist.bench.rounds import OUT_OF_MEMORY, attempt
from chunkdist.bench.sizes import LLAMA_3_8B, SIZES, Sizes
from chunkdist.bench.ways import BASELINE, OFFLOADED, REBUILT, Way

SMOKE_GIB = 1 + 4 / 1024
PRECISION = 16
"""The bisection ends when the interval is at most 1 / 16 of its lower end."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search knows when it ends.

    Args:
        fits: The longest that fits; 0: none that was tried.
        fails: The shortest that does not; `None`: everything that was tried fits.
        out_of_time: Whether the interval is wider than asked for.
    """

    fits: int
    fails: int | None
    out_of_time: bool


def longest(
    fits: Callable[[int], bool], *, start: int, step: int, limit: int, is_late: Callable[[], bool]
) -> Found:
    """The longest multiple of `step` up to `limit` that fits, if a shorter one fits whenever a longer one
    does; to 1 / 16 of it."""
    low, high = 0, None
    length = max(step, min(start, limit) // step * step)
    while True:
        if is_late():
            return Found(fits=low, fails=high, out_of_time=True)
        if fits(length):
            low = length
        else:
            high = length
        if high is None:
            if low >= limit // step * step:
                return Found(fits=low, fails=None, out_of_time=False)
            length = min(2 * low, limit // step * step)
        else:
            if high - low <= max(step, low // PRECISION):
                return Found(fits=low, fails=high, out_of_time=False)
            length = (low + high) // 2 // step * step
            assert low < length < high


def ways(chunk_size: int, attention: Any = "auto") -> list[Way]:
    """What is compared; the longest are last."""

    def chunked(name: str, **settings: Any) -> Way:
        return Way(name=name, config=ChunkConfig(chunk_size=chunk_size, attention=attention, **settings))

    return [
        Way(name=BASELINE),
        chunked("chunked, one group of all layers", layers_per_group="all"),
        chunked(REBUILT),
        chunked(OFFLOADED, offload="host"),
    ]


def on_cuda(model: Any, sizes: Sizes, way: Way, device: str) -> Callable[[int], bool]:
    """Whether a step on so many tokens ends without running out of memory.

    Raises:
        RuntimeError: it fails otherwise, when called.
    """

    def fits(num_tokens: int) -> bool:
        ids = replace(sizes, num_tokens=num_tokens).tokens(device)
        why_not = attempt(model, ids, way, is_timed=False).why_not
        if why_not not in (None, OUT_OF_MEMORY):
            raise RuntimeError(f"{way.name}, {num_tokens:,} tokens: {why_not}")
        return why_not is None

    return fits


def counted(sizes: dict[str, int], way: Way, memory_bytes: int) -> Callable[[int], bool]:
    """Whether the weights and the live bytes of a LoRA step on so many tokens are within `memory_bytes`."""
    layers = (2, 3) if way.config is None or way.config.offload == "host" else memory.NUM_LAYERS_RUN[:2]
    counted_way = memory.Way(name=way.name, config=way.config)
    weights = memory.weight_bytes(sizes)

    def fits(num_tokens: int) -> bool:
        peaks = {
            num: memory.peak_bytes(counted_way, {**sizes, "num_hidden_layers": num}, num_tokens)[0]
            for num in layers
        }
        return weights + memory.of_all_layers(peaks, sizes["num_hidden_layers"]) <= memory_bytes

    return fits


def fits_text(row: dict[str, Any]) -> str:
    """The longest that fits, for people to read."""
    return f"at least {row['fits']:,}" if row["out_of_time"] else f"{row['fits']:,}"


def table(result: dict[str, Any]) -> str:
    """The rows, for people to read."""
    lines = [f"{result['memory_gib']:.4g} GiB; {result['method']}", f"{'':44}{'fits':>20}{'does not':>12}"]
    for row in result["rows"]:
        fails = "-" if row["fails"] is None else f"{row['fails']:,}"
        lines.append(f"{row['way']:44}{fits_text(row):>20}{fails:>12}")
    return "\n".join([*lines, "", "tokens of a sequence in one step of training; at least: out of time"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = parser_of("max-length", "The longest that fits.", "model", "device", "threads", "memory-gib")
    parser.set_defaults(model="8b")
    parser.add_argument("--whole-card", action="store_true", help="all of the GPU's memory, not 24 GiB")
    parser.add_argument("--chunk-size", type=int, help="tokens of a chunk; default: the model's own")
    parser.add_argument("--only", default="", metavar="WORD", help="the ways whose names have it")
    parser.add_argument("--start", type=int, help="tokens tried first; default: 8,192")
    parser.add_argument("--limit", type=int, help="tokens, no more are tried; default: 1,048,576")
    parser.add_argument("--seconds", type=float, default=120.0, help="for each way; default: 120")
    options = parsed(parser, given)
    check_counts(parser, options, "start", "limit")
    for name, least in (("memory_gib", 1), ("seconds", 0)):
        value = getattr(options, name)
        if value is not None and not (least < value < math.inf):
            parser.error(f"--{name.replace('_', '-')} {value:g}: write a number above {least}")
    on_gpu = options.device.startswith("cuda")
    sizes = SIZES["smoke" if options.smoke else options.model]
    if not on_gpu and not options.smoke and options.model != "8b":
        parser.error(f"--model {options.model}: without a GPU only 8b is counted: leave --model out")
    if options.whole_card and (options.memory_gib is not None or not on_gpu):
        parser.error("--whole-card is for --device cuda, without --memory-gib: leave one of them out")
    if not options.whole_card:
        default = SMOKE_GIB if options.smoke else 24.0
        options.memory_gib = default if options.memory_gib is None else options.memory_gib
    chunk_size = options.chunk_size or (64 if options.smoke else sizes.chunk_size)
    sizes = replace(sizes, chunk_size=chunk_size)
    start, limit = options.start or (128 if options.smoke else 8192), options.limit or 2**20
    chosen = [way for way in ways(chunk_size, "auto" if on_gpu else "varlen") if options.only in way.name]
    if not chosen:
        parser.error(f"--only {options.only}: no way has it in its name")
    if limit < chunk_size:
        parser.error(f"--limit {limit} is less than a chunk: write {chunk_size} or more")
    counted_sizes = memory.SMALL if options.smoke else LLAMA_3_8B
    if on_gpu:
        limit_memory(parser, options)
    head = provenance("max-length", given, device=options.device)
    if on_gpu:
        model = replace(sizes, num_tokens=limit).model(options.device, dtype_on(options.device))
    result: dict[str, Any] = {
        **head,
        "method": "steps on the GPU" if on_gpu else "live bytes under FakeTensorMode and the weights; no GPU",
        "memory_gib": options.memory_gib or head["hardware"]["gpu_bytes"] / 2**30,
        "model": asdict(sizes) if on_gpu else {**counted_sizes, "lora_rank": 8},
        "chunk_size": chunk_size,
        "rows": [],
    }
    rows = result["rows"]
    for way in chosen:
        fits = (
            on_cuda(model, sizes, way, options.device)
            if on_gpu
            else counted(counted_sizes, way, int((options.memory_gib - 1) * 2**30))
        )
        deadline = time.perf_counter() + options.seconds
        trials = _Trials(
            way.name, fits, write=lambda row: write_partial({**result, "rows": [*rows, row]}, options.json)
        )
        found = longest(
            trials, start=start, step=chunk_size, limit=limit, is_late=partial(_is_late, deadline)
        )
        rows.append({"way": way.name, **asdict(found), "seconds_by_length": trials.seconds})
    write_result(result, options.json)
    print(table(result))
    return 0


def _is_late(deadline: float) -> bool:
    return time.perf_counter() > deadline


class _Trials:
    """Asks `fits`, keeps what each answer took, and writes what is known then: the next one may not come."""

    def __init__(
        self, name: str, fits: Callable[[int], bool], *, write: Callable[[dict[str, Any]], None]
    ) -> None:
        self.seconds: dict[int, float] = {}
        self._name, self._fits, self._write = name, fits, write
        self._known = Found(fits=0, fails=None, out_of_time=True)

    def __call__(self, num_tokens: int) -> bool:
        start = time.perf_counter()
        found = self._fits(num_tokens)
        self.seconds[num_tokens] = time.perf_counter() - start
        print(
            f"{self._name}: {num_tokens:,} {'fits' if found else 'does not fit'}", file=sys.stderr, flush=True
        )
        known = self._known
        self._known = replace(known, fits=num_tokens) if found else replace(known, fails=num_tokens)
        self._write({"way": self._name, **asdict(self._known), "seconds_by_length": self.seconds})
        return found


if __name__ == "__main__":
    sys.exit(main())
