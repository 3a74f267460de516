"""The error of bf16 gradients: chunked and plain, against length and chunk size.

The truth is the same model, with the same bf16 weights, in fp64, chunked with the `math` backend as one
chunk; the tests show that this is the plain model's gradient. A chunked gradient should be no worse than the
plain model's in the same dtype.

    python -m chunkdist.bench.gradient_error [--smoke] [--json FILE] [--device cuda] [--num-tokens N ...]
        [--chunk-sizes N ...]
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from chunkdist import ChunkConfig
from chunkdist.bench.environment import provenance, write_partial, write_result
from chunkdist.bench.largest import largest
from chunkdist.bench.options import check_counts, parsed, parser_of
from chunkdist.bench.sizes import SIZES, Sizes
from chunkdist.bench.ways import BASELINE, Way, prepared

PLAIN = "plain"


def ways(chunk_sizes: Sequence[int]) -> list[Way]:
    """In bf16."""
    found = [Way(name=PLAIN, method="plain"), Way(name=BASELINE)]
    for size in chunk_sizes:
        settings: dict[str, dict[str, Any]] = {
            "": {},
            ", K/V gradients in bf16": {"kv_grad_dtype": None},
            ", one group": {"layers_per_group": "all"},
        }
        found += [
            Way(name=f"chunks of {size:,}{name}", config=ChunkConfig(chunk_size=size, **setting))
            for name, setting in settings.items()
        ]
    return found


def gradients(model: Any, ids: Tensor, way: Way) -> dict[str, Tensor]:
    """Of one step, by parameter."""
    model.zero_grad(set_to_none=True)
    with prepared(model, way, on_gpu=ids.is_cuda) as step:
        step(ids)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def errors(found: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """Relative to the norm of the truth: of the whole gradient, and of the worst parameter."""
    assert found.keys() == truth.keys()
    squares = {name: (found[name].double() - truth[name]).square().sum() for name in truth}
    norms = {name: truth[name].square().sum() for name in truth}
    worst = largest(float((squares[name] / norms[name]).sqrt()) for name in truth)
    return {"error": float((sum(squares.values()) / sum(norms.values())) ** 0.5), "worst": worst}


def measure(
    sizes: Sizes,
    lengths: Sequence[int],
    chunk_sizes: Sequence[int],
    *,
    device: str,
    report: Callable[[str], None],
    write: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """What the JSON holds: errors by length and way. `write` is called after each, with what there is."""
    model = replace(sizes, num_tokens=max(lengths)).model(device, torch.bfloat16)
    exact_model = replace(sizes, num_tokens=max(lengths)).model(device, torch.float64)
    exact_model.load_state_dict(model.state_dict())
    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {
        "model": {**asdict(sizes), "num_parameters": model.num_parameters()},
        "rows": rows,
    }
    for num_tokens in lengths:
        report(f"{num_tokens:,} tokens")
        ids = replace(sizes, num_tokens=num_tokens).tokens(device)
        one_chunk = ChunkConfig(chunk_size=num_tokens, attention="math", layers_per_group=1)
        truth = gradients(exact_model, ids, Way(name="fp64", config=one_chunk))
        for way in ways(chunk_sizes):
            found = errors(gradients(model, ids, way), truth)
            rows.append({"num_tokens": num_tokens, "way": way.name, **found})
            if way.name == PLAIN:
                plain = found
            rows[-1]["ratio_to_plain"] = found["error"] / plain["error"]
            result["largest_ratio_to_plain"] = largest(row["ratio_to_plain"] for row in rows)
            write(result)
    return result


def table(result: dict[str, Any]) -> str:
    """The rows, for people to read."""
    lines = [f"{'bf16 against fp64':44}{'tokens':>9}{'error':>10}{'worst':>10}{'of plain':>10}"]
    for row in result["rows"]:
        figures = f"{row['error']:10.2e}{row['worst']:10.2e}{row['ratio_to_plain']:10.3f}"
        lines.append(f"{row['way']:44}{row['num_tokens']:9,}{figures}")
    return "\n".join(
        [*lines, "", "relative, of the norm: the whole gradient; the worst parameter; beside the plain model"]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = parser_of("gradient-error", "bf16 gradients against fp64.", "device", "threads")
    parser.add_argument("--num-tokens", type=int, nargs="+", help="lengths; default: 512 2048 4096")
    parser.add_argument("--chunk-sizes", type=int, nargs="+", help="default: 128 512")
    options = parsed(parser, given)
    check_counts(parser, options, "chunk_sizes")
    smoke: bool = options.smoke
    head = provenance("gradient-error", given, device=options.device)
    found = measure(
        SIZES["smoke" if smoke else "10m"],
        sorted(options.num_tokens or ([32, 64] if smoke else [512, 2048, 4096])),
        options.chunk_sizes or ([8, 16] if smoke else [128, 512]),
        device=options.device,
        report=lambda line: print(line, file=sys.stderr),
        write=lambda found: write_partial({**head, **found}, options.json),
    )
    write_result({**head, **found}, options.json)
    print(table({**head, **found}))
    return 1 if math.isnan(found["largest_ratio_to_plain"]) else 0


if __name__ == "__main__":
    sys.exit(main())
