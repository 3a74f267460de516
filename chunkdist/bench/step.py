"""The time and memory of a training step by length: chunked, and by each baseline, in one process.

A step is a forward with its loss and a backward, without the optimizer. All ways (`chunkdist.bench.ways`) run
on the same weights and tokens, with flash attention and the same tiled loss, in turn, in an order that
rotates (`chunkdist.bench.rounds`): what disturbs the machine disturbs all of them. A ratio is the median of
the ratios of each round. A way that runs out of memory, or fails, says so, and is left out at longer lengths;
the exit status is 1 when one has failed otherwise.

    python -m chunkdist.bench.step [--smoke] [--json FILE] [--repetitions N] [--device cuda] [--model 8b]
        [--num-layers N] [--num-tokens N ...] [--chunk-size N] [--chunk-sizes N ...] [--groups N ...]
        [--memory-gib 24] [--offload] [--variants all] [--without WORD ...] [--only NAME ...]
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any

import torch

from chunkdist.bench.environment import provenance, write_partial, write_result
from chunkdist.bench.options import check_counts, dtype_on, limit_memory, parsed, parser_of
from chunkdist.bench.rounds import DEVICE_LOST, OUT_OF_MEMORY, Rounds, Step
from chunkdist.bench.sizes import SIZES, Sizes
from chunkdist.bench.timing import matmul_flops, step_flops
from chunkdist.bench.ways import VARIANTS, Way, baselines, chunked, variants

NAME_WIDTH = 50
WARMED_UP = "warmed up, not timed"


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
    """Runs every way at every length, `num_rounds` times; returns what the JSON holds.

    Args:
        lengths: Tokens, ascending.
        write: Called after each warm-up and each step, with what there is so far.
    """
    model = replace(sizes, num_tokens=lengths[-1]).model(device, dtype)
    rate = matmul_flops(device, dtype)
    names, lost = [way.name for way in ways], dict[str, str]()
    result: dict[str, Any] = {
        "model": {
            **asdict(sizes),
            "num_tokens": lengths[-1],
            "num_parameters": model.num_parameters(),
            "dtype": str(dtype).removeprefix("torch."),
        },
        "baseline": names[0],
        "matmul_flops": rate,
        "matmul_flops_measured": [rate],
        "rows": [],
        "summary": {},
        "steps": [],
    }

    def ways_left(num_tokens: int, ways: Sequence[Way]) -> list[Way]:
        report(f"{num_tokens:,} tokens")
        ids = replace(sizes, num_tokens=num_tokens).tokens(device if ways else "cpu")  # it may be lost
        flops = step_flops(model, num_tokens)
        rows, steps = result["rows"], result["steps"]

        def changed(here: Rounds) -> None:
            lost.update(here.lost)
            found = _rows(here, num_tokens, lost, names[0], flops, rate)
            result["rows"] = [*rows, *sorted(found, key=lambda row: names.index(row["way"]))]
            result["steps"] = [*steps, *map(asdict, here.steps)]
            if num_tokens == lengths[-1]:
                result["summary"] = {row["way"]: row for row in found if row["outcome"] == "ran"}
            write(result)

        here = Rounds(model, ids, ways, report=report, changed=changed)
        here.run(num_rounds)
        lost.update({way.name: DEVICE_LOST for way in ways if way not in here.left and way.name not in lost})
        return here.left

    left = list(ways)
    for num_tokens in lengths:
        left = ways_left(num_tokens, left)
    with suppress(RuntimeError):  # the device may be lost
        _at_rate(result, matmul_flops(device, dtype))
    return result


def _at_rate(result: dict[str, Any], at_the_end: float) -> None:
    """Utilisation is a share of the larger rate: a cold card, and one that is throttled, are slower."""
    old, result["matmul_flops_measured"] = result["matmul_flops"], [result["matmul_flops"], at_the_end]
    result["matmul_flops"] = max(old, at_the_end)
    for row in result["rows"]:  # those of the summary are the same
        row |= {
            name: row[name] * old / result["matmul_flops"] for name in ("mfu", "mfu_needed") if name in row
        }


def _rows(
    here: Rounds, num_tokens: int, lost: dict[str, str], baseline: str, flops: dict[str, int], rate: float
) -> list[dict[str, Any]]:
    """Of one length: each way that was lost, here or at a shorter one, has run, or has warmed up."""
    rows: list[dict[str, Any]] = [
        {"num_tokens": num_tokens, "way": name, "outcome": why} for name, why in lost.items()
    ]
    base, timed = None if baseline in lost else baseline, {step.way for step in here.steps}
    for name, peak in here.peaks.items():
        row = {
            "num_tokens": num_tokens,
            "way": name,
            "outcome": "ran" if name in timed else WARMED_UP,
            **asdict(peak),
            "largest_gradient_difference": here.differences[name],
            "compared_with": here.compared_with,
        }
        if name in here.plans:
            row["plan"] = here.plans[name]
        if name in timed:
            row |= _summary(here.steps, name, base) | _utilisation(here.steps, name, num_tokens, flops, rate)
        rows.append(row)
    return rows


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
    for name in ("num_reruns", "num_device_allocations"):
        result[name] = sum(getattr(step, name) for step in mine.values())
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
        f"{machine.get('gpu', machine['cpu'])}, {_memory(result['memory_gib'])}"
        f"{machine['num_threads']} CPU threads, medians of {result['num_repetitions']} rounds, "
        f"a large matrix product {result['matmul_flops'] / 1e12:.3g} TFLOP/s",
    ]
    num_tokens = None
    for row in result["rows"]:
        if row["num_tokens"] != num_tokens:
            num_tokens = row["num_tokens"]
            head = f"{f'{num_tokens:,} tokens':{NAME_WIDTH}}{'wall':>11}{'ratio':>8}{'CPU':>8}{'MFU':>8}"
            lines += ["", head + f"{'needed':>8}{'gradients':>11}{'peak':>12}{'reserved':>12}"]
        line = f"{row['way']:{NAME_WIDTH}}"
        if row["outcome"] == "ran":
            ratios = "".join(f"{row.get(f'{name}_ratio', float('nan')):8.3f}" for name in ("wall", "cpu"))
            line += f"{row['median_wall_s']:9.3f} s{ratios}{row['mfu']:8.1%}{row['mfu_needed']:8.1%}"
        else:
            line += f"      {row['outcome']:37}"
        if row["outcome"] in ("ran", WARMED_UP):
            line += f"{row['largest_gradient_difference']:11.1e}"
            for peak in (row["peak_allocated_bytes"], row["peak_reserved_bytes"]):
                line += f"{'-':>12}" if peak is None else f"{peak / 2**30:8.2f} GiB"
        lines.append(line.rstrip())
    lines += [
        "",
        f"ratio, of wall and CPU time: to {result['baseline']}, median over rounds; gradients: largest",
        "relative difference from the first that ran; MFU: model FLOPs (frozen weights too) at that rate;",
        "needed: without the gradients of frozen weights, which nobody computes;",
        "peak, reserved: of the warm-up, by tensors and with the allocator's cache",
    ]
    plans = [f"{row['way']}, {row['num_tokens']:,}: {row['plan']}" for row in result["rows"] if "plan" in row]
    return "\n".join([*lines, *plans, *_asking(result["rows"])])


def _memory(memory_gib: float | None) -> str:
    return "" if memory_gib is None else f"within {memory_gib:g} GiB (the allocator: {memory_gib - 1:g}), "


def _asking(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The steps that were not like those of a training loop, whose cache is warm."""
    asking = [row for row in rows if row.get("num_reruns") or row.get("num_device_allocations")]
    return [
        f"{row['way']}, {row['num_tokens']:,}: {row['num_reruns']} step(s) run again, since the allocator "
        f"asked the device for memory; {row['num_device_allocations']} times in those that count"
        for row in asking
    ]


def report_ways(name: str, given: Sequence[str], options: Any, sizes: Sizes, ways: Sequence[Way]) -> int:
    """Measures as the command line says, writes the JSON of benchmark `name`, and prints the table; returns
    the exit status."""
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
        report=lambda line: print(line, file=sys.stderr, flush=True),
        write=lambda found: write_partial({**head, **found}, options.json),
    )
    write_result({**head, **found}, options.json)
    print(table({**head, **found}))
    return 0 if all(row["outcome"] in ("ran", OUT_OF_MEMORY) for row in found["rows"]) else 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = parser_of(
        *("step", "Time and memory of a step, chunked and by each baseline."),
        *("model", "repetitions", "device", "threads", "memory-gib", "flash-impl", "num-layers"),
        num_rounds=(7, 2),
    )
    parser.add_argument("--num-tokens", type=int, nargs="+", help="lengths; default: the model's own")
    parser.add_argument("--chunk-size", type=int, help="tokens of a chunk; default: the model's own")
    parser.add_argument("--chunk-sizes", type=int, nargs="+", default=[], help="others, of the default way")
    parser.add_argument("--groups", type=int, nargs="+", default=[], help="groups of so many layers, too")
    parser.add_argument(
        "--without", nargs="+", default=[], metavar="WORD", help="not ways with it in the name"
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these, in this order")
    parser.add_argument("--offload", action="store_true", help="host offload, too")
    parser.add_argument(
        *("--variants",),
        nargs="+",
        default=[],
        choices=["all", *VARIANTS],
        help="of the fastest way, and of the baseline where they concern it; all: those that run here",
    )
    options = parsed(parser, given)
    check_counts(parser, options, "chunk_sizes", "groups")
    on_gpu = options.device.startswith("cuda")
    sizes = SIZES["smoke" if options.smoke else options.model]
    sizes = replace(
        sizes,
        chunk_size=options.chunk_size or sizes.chunk_size,
        num_layers=options.num_layers or sizes.num_layers,
    )
    ways = [
        *baselines(sizes.chunk_size, on_gpu=on_gpu),
        *chunked(
            sizes.chunk_size,
            offload=options.offload,
            chunk_sizes=options.chunk_sizes,
            groups=options.groups,
        ),
        *variants(options.variants, sizes.chunk_size, on_gpu=on_gpu),
    ]
    ways = [way for way in ways if not any(word in way.name for word in options.without)]
    if options.only:
        by_name = {way.name: way for way in ways}
        if unknown := [name for name in options.only if name not in by_name]:
            parser.error(f"--only {unknown[0]!r}: that is no way here: write some of {', '.join(by_name)}")
        ways = [by_name[name] for name in dict.fromkeys(options.only)]
    if not ways:
        parser.error(f"--without {' '.join(options.without)}: no way is left")
    limit_memory(parser, options)
    return report_ways("step", given, options, sizes, ways)


if __name__ == "__main__":
    sys.exit(main())
