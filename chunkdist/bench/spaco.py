"""The time of a SpaCO step beside its parts: a forward without gradients, and the exact backward.

With t of k chunks, a step should cost the forward and t / k of the exact backward. All are run in turn, in
one process, each after one to warm up; a ratio is the median of the ratios of each round that has both.

    python -m chunkdist.bench.spaco [--smoke] [--json FILE] [--repetitions N] [--device cuda]
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from chunkdist import ChunkConfig, FixedBudgetSampler, chunk_model, unchunk_model
from chunkdist.bench.environment import provenance, write_partial, write_result
from chunkdist.bench.options import dtype_on, parsed, parser_of
from chunkdist.bench.sizes import SIZES, Sizes
from chunkdist.bench.timing import settled

NUM_CHUNKS = 128


def measure(
    sizes: Sizes,
    budgets: Sequence[int],
    *,
    device: str,
    dtype: torch.dtype,
    num_rounds: int,
    write: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Seconds of each round, and the ratios of SpaCO's steps to what they should cost.

    `write` is called after each step, with what there is so far.
    """
    model = sizes.model(device, dtype)
    ids = sizes.tokens(device)
    exact = ChunkConfig(chunk_size=sizes.chunk_size)
    ways: dict[str, Callable[[], list[float]]] = {
        "no-grad forward": lambda: _timed(model, ids, exact, with_gradients=False),
        "exact step": lambda: _timed(model, ids, exact),
    }
    for budget in budgets:
        sampler = FixedBudgetSampler(budget)  # as many chunks in every round
        for name, variate in (("", True), (", no control variate", False)):
            config = replace(exact, sampler=sampler, control_variate=variate)
            ways[f"{budget} chunks{name}"] = lambda config=config: _timed(model, ids, config)  # type: ignore[misc]
    torch.manual_seed(0)
    rounds: list[dict[str, list[float]]] = []
    names = list(ways)
    num_chunks = -(-sizes.num_tokens // sizes.chunk_size)
    result: dict[str, Any] = {
        "model": {**asdict(sizes), "num_parameters": model.num_parameters(), "num_chunks": num_chunks},
        "num_reruns": 0,
        "summary": {},
        "rounds": rounds,
    }
    for number in range(num_rounds):
        print(f"round {number + 1} of {num_rounds}", file=sys.stderr, flush=True)
        seconds: dict[str, list[float]] = {}
        for name in names[number % len(names) :] + names[: number % len(names)]:
            if number == 0:
                ways[name]()  # to warm up
            seconds[name], num_reruns, _ = settled(ways[name], on_gpu=ids.is_cuda)
            result["num_reruns"] += num_reruns
            rounds[number:] = [{name: seconds[name] for name in names if name in seconds}]
            result["summary"] = _summary(rounds, num_chunks)
            write(result)
    return result


def _summary(rounds: Sequence[dict[str, list[float]]], num_chunks: int) -> dict[str, dict[str, float]]:
    summary = {}
    for name in rounds[0]:
        steps = [sum(one[name]) for one in rounds if name in one]
        summary[name] = {"median_s": statistics.median(steps)}
        whole = [one for one in rounds if {name, "no-grad forward", "exact step"} <= one.keys()]
        if whole and name.partition(" ")[0].isdigit():
            share = int(name.partition(" ")[0]) / num_chunks
            ratios = [
                sum(one[name]) / (sum(one["no-grad forward"]) + share * one["exact step"][1]) for one in whole
            ]
            to_exact = [sum(one[name]) / sum(one["exact step"]) for one in whole]
            to_forward = [sum(one[name]) / sum(one["no-grad forward"]) for one in whole]
            summary[name] |= {
                "ratio": statistics.median(ratios),
                "of_exact": statistics.median(to_exact),
                "of_forward": statistics.median(to_forward),
                "faster_than_exact": statistics.median(1 / ratio for ratio in to_exact),
            }
    return summary


def _timed(
    model: PreTrainedModel, ids: Tensor, config: ChunkConfig, *, with_gradients: bool = True
) -> list[float]:
    """Seconds of the forward, and of the backward."""
    model.zero_grad(set_to_none=True)
    chunk_model(model, config)
    marks = [_now(ids)]
    with torch.set_grad_enabled(with_gradients):
        loss = model(input_ids=ids, labels=ids).loss
    marks.append(_now(ids))
    if with_gradients:
        loss.backward()
        marks.append(_now(ids))
    unchunk_model(model)
    return [after - before for before, after in pairwise(marks)]


def _now(ids: Tensor) -> float:
    if ids.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def table(result: dict[str, Any]) -> str:
    """The summary, for people to read."""
    model = result["model"]
    lines = [
        f"Llama of {model['num_parameters'] / 1e6:.1f}M parameters, {model['num_tokens']:,} tokens in "
        f"{model['num_chunks']} chunks, medians of {result['num_repetitions']} rounds",
        "",
        f"{'':34}{'step':>11}{'faster than SeCO':>18}{'of the forward':>16}{'of its parts':>14}",
    ]
    for name, row in result["summary"].items():
        ratios = (
            f"{row['faster_than_exact']:16.2f} x{row['of_forward']:14.2f} x{row['ratio']:12.2f} x"
            if "ratio" in row
            else ""
        )
        lines.append(f"{name:34}{row['median_s']:9.3f} s{ratios}")
    lines += [
        "",
        "its parts: the no-grad forward and budget / chunks of the exact backward; SeCO: the exact step",
    ]
    return "\n".join([*lines, "to reach, 8 of 128 chunks: 3 x faster at 16K; 1.3 x of the forward at 128K"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = parser_of(
        *("spaco", "The time of a SpaCO step beside its parts."),
        *("model", "repetitions", "device"),
        num_rounds=(5, 5),
    )
    parser.add_argument("--num-tokens", type=int, help="tokens of the sequence; default: the model's own")
    parser.add_argument("--budgets", type=int, nargs="+", default=[8], help="chunks kept; default: 8")
    options = parsed(parser, given)
    sizes = SIZES["smoke" if options.smoke else options.model]
    num_tokens = options.num_tokens or sizes.num_tokens
    num_chunks = 16 if options.smoke else NUM_CHUNKS
    if num_tokens % num_chunks or not all(0 < budget <= num_chunks for budget in options.budgets):
        parser.error(f"write a multiple of {num_chunks} tokens, and budgets from 1 to {num_chunks}")
    head = {
        **provenance("spaco", given, device=options.device),
        "num_repetitions": options.repetitions,
    }
    found = measure(
        replace(sizes, num_tokens=num_tokens, chunk_size=num_tokens // num_chunks),
        options.budgets,
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
