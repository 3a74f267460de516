"""The time and memory of a step with `offload="none"` and with `offload="host"`, by length.

Ratios are to the step without offload. On a CPU both hold the same memory: only a GPU shows a difference.

    python -m chunkdist.bench.offload [--smoke] [--json FILE] [--repetitions N] [--device cuda] [--model 8b]
        [--num-tokens N ...] [--chunk-size N] [--memory-gib 24]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

from chunkdist import ChunkConfig
from chunkdist.bench.options import limit_memory, parsed, parser_of
from chunkdist.bench.sizes import SIZES
from chunkdist.bench.step import report_ways
from chunkdist.bench.ways import Way


def ways(chunk_size: int) -> list[Way]:
    """Without offload first, which the others are compared with."""

    device, host = ChunkConfig(chunk_size=chunk_size), ChunkConfig(chunk_size=chunk_size, offload="host")
    return [
        Way(name="chunked", config=device),
        Way(name="chunked, on the host", config=host),
        Way(name="chunked, K/V kept", config=replace(device, rebuild_kv=False)),
        Way(name="chunked, K/V kept, on the host", config=replace(host, rebuild_kv=False)),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = parser_of(
        *("offload", "A step with and without host offload."),
        *("model", "repetitions", "device", "threads", "memory-gib"),
        num_rounds=(5, 2),
    )
    parser.add_argument("--num-tokens", type=int, nargs="+", help="lengths; default: the model's own")
    parser.add_argument("--chunk-size", type=int, help="tokens of a chunk; default: the model's own")
    options = parsed(parser, given)
    sizes = SIZES["smoke" if options.smoke else options.model]
    sizes = replace(sizes, chunk_size=options.chunk_size or sizes.chunk_size)
    limit_memory(parser, options)
    return report_ways("offload", given, options, sizes, ways(sizes.chunk_size))


if __name__ == "__main__":
    sys.exit(main())
