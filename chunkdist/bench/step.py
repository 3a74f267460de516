"""The time and memory of a training step by length: chunked, and by each baseline, in one process.

A step is a forward with its loss and a backward, without the optimizer. All ways (`chunkdist.bench.ways`) run
on the same weights and tokens, with flash attention and the same tiled loss, in turn, in an order that
rotates: what disturbs the machine disturbs all of them. A ratio is the median of the ratios of each round. A
way that runs out of memory says so, and is left out at longer lengths.

    python -m chunkdist.bench.step [--smoke] [--json FILE] [--repetitions N] [--device cuda] [--model 8b]
        [--num-tokens N ...] [--chunk-sizes N ...] [--groups N ...] [--memory-gib 24] [--offload]
        [--without WORD ...]
"""

from __future__ import annotations

import gc
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from chunkdist.bench.environment import provenance, write_result
from chunkdist.bench.options import check_counts, dtype_on, parsed, parser_of
from chunkdist.bench.sizes import SIZES, Sizes
from chunkdist.bench.timing import Cost, cost_of, limit_gpu_memory, matmul_flops, step_flops
from chunkdist.bench.ways import Way, baselines, chunked, prepared

OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True, kw_only=True)
class Step(Cost):
    """One step of one way."""

    num_tokens: int
    round: int
    way: str


def measure(
    sizes: Sizes,
    ways: Sequence[Way],
    lengths: Sequence[int],
    *,
    device: str,
    dtype: torch.dtype,
    num_rounds: int,
    report: Callable[[str], None],
    write: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Runs every way at every length once to warm up, then `num_rounds` times; returns what the JSON holds.

    The warm-up compares the gradients with those of the first way: a fast wrong step is no step.

    Args:
        lengths: Tokens, ascending.
        write: Called after each warm-up and each step, with what there is so far.
    """
    model = replace(sizes, num_tokens=lengths[-1]).model(device, dtype)
    rate = matmul_flops(device, dtype)
    left, names = list(ways), [way.name for way in ways]
    result: dict[str, Any] = {
        "model": {
            **asdict(sizes),
            "num_tokens": lengths[-1],
            "num_parameters": model.num_parameters(),
            "dtype": str(dtype).removeprefix("torch."),
        },
        "baseline": names[0],
        "matmul_flops": rate,
        "rows": [],
        "summary": {},
        "steps": [],
    }
    for num_tokens in lengths:
        report(f"{num_tokens:,} tokens")
        ids = replace(sizes, num_tokens=num_tokens).tokens(device)
        differences = _warmed_up(model, ids, left, report)
        left = [way for way in left if way.name in differences]
        flops = step_flops(model, num_tokens)
        rows, steps = result["rows"], result["steps"]
        for with_room, here in _rounds(model, ids, left, num_rounds, report):
            left = with_room
            missing = [name for name in names if name not in {way.name for way in left}]
            lost: list[dict[str, Any]] = [
                {"num_tokens": num_tokens, "way": name, "outcome": OUT_OF_MEMORY} for name in missing
            ]
            base = None if names[0] in missing else names[0]
            ran = [
                {
                    "num_tokens": num_tokens,
                    "way": name,
                    "outcome": "ran",
                    **_summary(here, name, base),
                    "largest_gradient_difference": differences[name],
                    **_utilisation(here, name, num_tokens, flops, rate),
                }
                for name in dict.fromkeys(step.way for step in here)
            ]
            result["rows"] = [*rows, *sorted([*lost, *ran], key=lambda row: names.index(row["way"]))]
            result["steps"] = [*steps, *map(asdict, here)]
            if num_tokens == lengths[-1]:
                result["summary"] = {
                    row["way"]: row for row in result["rows"][len(rows) :] if row["outcome"] == "ran"
                }
            write(result)
    return result


def _warmed_up(
    model: Any, ids: Tensor, ways: Sequence[Way], report: Callable[[str], None]
) -> dict[str, float | None]:
    """By way that does not run out of memory, how far its gradients are from the first one's; `None` where
    that one has not run."""
    expected: dict[str, Tensor] = {}
    differences: dict[str, float | None] = {}
    for number, way in enumerate(ways):
        report(f"warm-up: {way.name}")
        if attempt(model, ids, way) is None:
            report(f"{way.name}: {OUT_OF_MEMORY}")
            continue
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        if number == 0:
            expected = {name: grad.clone() for name, grad in grads.items()}
        differences[way.name] = largest_difference(grads, expected) if expected else None
    return differences


def _rounds(
    model: Any, ids: Tensor, ways: Sequence[Way], num_rounds: int, report: Callable[[str], None]
) -> Iterator[tuple[list[Way], list[Step]]]:
    """At first and after each step, the ways that have had room in every round, and their steps: room in the
    warm-up promises none later, when memory is in other pieces."""
    left, steps = list(ways), list[Step]()
    yield left, steps
    for number in range(1, num_rounds + 1):
        report(f"round {number} of {num_rounds}")
        shift = (number - 1) % max(1, len(left))
        for way in left[shift:] + left[:shift]:
            cost = attempt(model, ids, way)
            if cost is None:
                report(f"{way.name}: {OUT_OF_MEMORY}")
                left = [other for other in left if other is not way]
                steps = [step for step in steps if step.way != way.name]
            else:
                steps.append(Step(**asdict(cost), num_tokens=ids.shape[1], round=number, way=way.name))
            yield left, steps


def attempt(model: Any, ids: Tensor, way: Way, *, is_timed: bool = True) -> Cost | None:
    """The cost of one step; `None` where it runs out of the GPU's memory. The gradients stay.

    Args:
        is_timed: Else the first step of host offload, which pins its memory, is the only one.
    """
    model.zero_grad(set_to_none=True)
    try:
        with prepared(model, way, on_gpu=ids.is_cuda) as step:
            if (
                is_timed and way.config is not None and way.config.offload == "host"
            ):  # its memory is pinned in the first
                step(ids)
                model.zero_grad(set_to_none=True)
            return cost_of(lambda: step(ids), on_gpu=ids.is_cuda)
    except torch.OutOfMemoryError:
        pass  # here, so that the traceback no longer holds tensors when memory is given back
    model.zero_grad(set_to_none=True)
    gc.collect()
    torch.cuda.empty_cache()
    return None


def largest_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Over all parameters, the norm of the difference, relative to the norm."""
    assert found.keys() == expected.keys()
    return max(
        float((found[name] - expected[name]).float().norm() / expected[name].float().norm())
        for name in expected
    )


def _summary(steps: Sequence[Step], way: str, baseline: str | None) -> dict[str, float | int | None]:
    """Medians, and ratios over the rounds that both have: the last one may not have ended."""
    mine = {step.round: step for step in steps if step.way == way}
    base = {step.round: step for step in steps if step.way == baseline}
    both = [(mine[number], base[number]) for number in mine if number in base]
    result: dict[str, float | int | None] = {}
    for name in ("wall_s", "cpu_s"):
        short = name.removesuffix("_s")
        result[f"median_{name}"] = statistics.median(getattr(step, name) for step in mine.values())
        if not both:
            continue
        times, base_times = ([getattr(step, name) for step in own] for own in zip(*both, strict=True))
        ratios = [time_s / max(base_s, 1e-9) for time_s, base_s in zip(times, base_times, strict=True)]
        result |= {
            f"{short}_ratio": statistics.median(ratios),
            f"{short}_ratio_lowest": min(ratios),
            f"{short}_ratio_highest": max(ratios),
            f"{short}_ratio_of_fastest": min(times) / max(min(base_times), 1e-9),
        }
    for name in ("peak_allocated_bytes", "peak_reserved_bytes"):
        peaks = [getattr(step, name) for step in mine.values()]
        result[name] = max((peak for peak in peaks if peak is not None), default=None)
    return result


def _utilisation(
    steps: Sequence[Step], way: str, num_tokens: int, flops: dict[str, int], rate: float
) -> dict[str, float]:
    median_s = statistics.median(step.wall_s for step in steps if step.way == way)
    return {
        "tokens_per_s": num_tokens / median_s,
        "mfu": flops["by_convention"] / median_s / rate,
        "mfu_needed": flops["needed"] / median_s / rate,
    }


def table(result: dict[str, Any]) -> str:
    """All rows, for people to read."""
    model, machine = result["model"], result["hardware"]
    lines = [
        f"Llama of {model['num_parameters'] / 1e6:.1f}M parameters ({model['num_layers']} layers, hidden "
        f"{model['hidden_size']}, vocabulary {model['vocab_size']:,}), {model['dtype']}, "
        f"LoRA rank {model['lora_rank'] or '-'}, chunks of {model['chunk_size']:,}",
        f"{machine.get('gpu', machine['cpu'])}, {machine['num_threads']} CPU threads, "
        f"medians of {result['num_repetitions']} rounds, a large matrix product "
        f"{result['matmul_flops'] / 1e12:.3g} TFLOP/s",
    ]
    num_tokens = None
    for row in result["rows"]:
        if row["num_tokens"] != num_tokens:
            num_tokens = row["num_tokens"]
            head = f"{f'{num_tokens:,} tokens':44}"
            lines += ["", head + f"{'wall':>11}{'ratio':>8}{'CPU':>8}{'MFU':>8}{'gradients':>11}{'peak':>12}"]
        if row["outcome"] != "ran":
            lines.append(f"{row['way']:44}{row['outcome']:>19}")
            continue
        peak, difference = row["peak_allocated_bytes"], row["largest_gradient_difference"]
        ratios = "".join(f"{row.get(f'{name}_ratio', float('nan')):8.3f}" for name in ("wall", "cpu"))
        lines.append(
            f"{row['way']:44}{row['median_wall_s']:9.3f} s{ratios}{row['mfu']:8.1%}"
            + (f"{'-':>11}" if difference is None else f"{difference:11.1e}")
            + (f"{peak / 2**30:8.2f} GiB" if peak else f"{'-':>12}")
        )
    lines += [
        "",
        f"ratio, of wall and CPU time: to {result['baseline']}, median over rounds; gradients: largest",
    ]
    return "\n".join(
        [*lines, "relative difference from it; MFU: model FLOPs (frozen weights too) at that rate"]
    )


def report_ways(name: str, given: Sequence[str], options: Any, sizes: Sizes, ways: Sequence[Way]) -> None:
    """Measures as the command line says, writes the JSON of benchmark `name`, and prints the table."""
    head = {
        **provenance(name, given, device=options.device),
        "num_repetitions": options.repetitions,
        "memory_gib": options.memory_gib,
    }
    found = measure(
        sizes,
        ways,
        sorted(options.num_tokens or [sizes.num_tokens]),
        device=options.device,
        dtype=dtype_on(options.device),
        num_rounds=options.repetitions,
        report=lambda line: print(line, file=sys.stderr),
        write=lambda found: write_result({**head, **found}, options.json),
    )
    print(table({**head, **found}))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = parser_of(
        *("step", "Time and memory of a step, chunked and by each baseline."),
        *("model", "repetitions", "device", "threads", "memory-gib", "flash-impl"),
        num_rounds=(7, 2),
    )
    parser.add_argument("--num-tokens", type=int, nargs="+", help="lengths; default: the model's own")
    parser.add_argument("--chunk-size", type=int, help="tokens of a chunk; default: the model's own")
    parser.add_argument("--chunk-sizes", type=int, nargs="+", default=[], help="others, of the default way")
    parser.add_argument("--groups", type=int, nargs="+", default=[], help="groups of so many layers, too")
    parser.add_argument(
        "--without", nargs="+", default=[], metavar="WORD", help="not ways with it in the name"
    )
    parser.add_argument("--offload", action="store_true", help="host offload, too")
    options = parsed(parser, given)
    check_counts(parser, options, "chunk_sizes", "groups")
    sizes = SIZES["smoke" if options.smoke else options.model]
    sizes = replace(sizes, chunk_size=options.chunk_size or sizes.chunk_size)
    limit_gpu_memory(options.memory_gib)
    ways = [
        *baselines(sizes.chunk_size, on_gpu=options.device.startswith("cuda")),
        *chunked(
            sizes.chunk_size,
            offload=options.offload,
            chunk_sizes=options.chunk_sizes,
            groups=options.groups,
        ),
    ]
    ways = [way for way in ways if not any(word in way.name for word in options.without)]
    if not ways:
        parser.error(f"--without {' '.join(options.without)}: no way is left")
    report_ways("step", given, options, sizes, ways)
    return 0


if __name__ == "__main__":
    sys.exit(main())
