"""The time of a SpaCO step beside its parts: a forward without gradients, and the exact backward.

With t of k chunks, a step should cost the forward and t / k of the exact backward. All are run in turn, in
one process, each after one to warm up; a ratio is the median of the ratios of each round that has both.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from chunkdist import ChunkConfig, FixedBudgetSampler, chunk_model, unchunk_model
from chunkdist.bench.models import Sizes
from chunkdist.bench.options import count, parser_of, sizes_of
from chunkdist.bench.report import Run
from chunkdist.bench.timing import cost_of, report_progress, rotated

NUM_CHUNKS = 128
FORWARD, EXACT = "no-grad forward", "exact step"
COLUMNS = ("variant", "median_wall_s", "faster_than_exact", "of_exact", "of_forward", "of_parts")
NOTE = "Its parts: the no-grad forward, and budget / chunks of the exact backward. SeCO: the exact step."


def measure(sizes: Sizes, budgets: Sequence[int], run: Run) -> None:
    """Seconds of each round, and the ratios of SpaCO's steps to what they should cost."""
    model, ids = sizes.model(run.device, run.dtype), sizes.tokens(run.device)
    exact = ChunkConfig(chunk_size=sizes.chunk_size)
    variants: dict[str, tuple[ChunkConfig, int]] = {FORWARD: (exact, 0), EXACT: (exact, 0)}
    for budget in budgets:
        sampler = FixedBudgetSampler(budget)  # as many chunks in every round
        for name, variate in (("", True), (", no control variate", False)):
            config = replace(exact, sampler=sampler, control_variate=variate)
            variants[f"{budget} chunks{name}"] = config, budget
    torch.manual_seed(0)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    backward_s: list[float] = []
    num_chunks = sizes.num_tokens // sizes.chunk_size
    shares = {name: budget / num_chunks for name, (_, budget) in variants.items()}
    run.result |= {"model": {**sizes.described(model), "num_chunks": num_chunks}, "num_reruns": 0}
    for number in range(run.num_rounds):
        for name in rotated(list(variants), number):
            report_progress(f"round {number + 1} of {run.num_rounds}: {name}")
            backwards: list[float] = []
            step = _step(model, ids, variants[name][0], None if name == FORWARD else backwards)
            if number == 0:
                step()  # to warm up
            cost = cost_of(step)
            seconds[name].append(cost.wall_s)
            if name == EXACT:
                backward_s.append(backwards[-1])
            run.result["num_reruns"] += cost.num_reruns
            run.rows[:] = rows_of(seconds, backward_s, shares)
            run.save()


def rows_of(
    seconds: dict[str, list[float]], backward_s: list[float], shares: dict[str, float]
) -> list[dict[str, Any]]:
    """A row for each variant that has run.

    Args:
        seconds: By variant, in the order of the rounds; the last one may not have ended.
        backward_s: The backwards of the exact steps.
        shares: By variant, the share of the chunks that it backpropagates.
    """
    rows = []
    for name, own in seconds.items():
        if not own:
            continue
        row: dict[str, Any] = {"variant": name, "median_wall_s": statistics.median(own), "wall_s": own}
        whole = list(zip(own, seconds[FORWARD], seconds[EXACT], backward_s, strict=False))
        if shares[name] and whole:
            parts = [(o, f, e, f + shares[name] * b) for o, f, e, b in whole]
            row |= {
                "of_parts": statistics.median(o / p for o, _, _, p in parts),
                "of_exact": statistics.median(o / e for o, _, e, _ in parts),
                "of_forward": statistics.median(o / f for o, f, _, _ in parts),
                "faster_than_exact": statistics.median(e / o for o, _, e, _ in parts),
            }
        rows.append(row)
    return rows


def _step(
    model: PreTrainedModel, ids: Tensor, config: ChunkConfig, backward_s: list[float] | None
) -> Callable[[], None]:
    """A step, which appends the seconds of its backward; without a list, a forward without gradients."""

    def step() -> None:
        model.zero_grad(set_to_none=True)
        chunk_model(model, config)
        with torch.set_grad_enabled(backward_s is not None):
            loss = model(input_ids=ids, labels=ids).loss
        if backward_s is not None:
            backward_s.append(cost_of(loss.backward, max_reruns=0).wall_s)
        unchunk_model(model)

    return step


def main(arguments: Sequence[str]) -> int:
    """Runs the benchmark; returns the exit status."""
    names = ("model", "num-tokens", "repetitions", "device", "threads")
    parser = parser_of("spaco", "The time of a step beside its parts.", *names, num_rounds=(5, 2))
    parser.add_argument("--budgets", type=count, nargs="+", default=[8], help="chunks sampled; default: 8")
    run = Run(parser, arguments)
    sizes, budgets = sizes_of(run.options), run.options.budgets
    num_chunks = 16 if run.options.smoke else NUM_CHUNKS
    if sizes.num_tokens % num_chunks or not all(0 < budget <= num_chunks for budget in budgets):
        parser.error(f"write a multiple of {num_chunks} tokens, and budgets from 1 to {num_chunks}")
    measure(replace(sizes, chunk_size=sizes.num_tokens // num_chunks), budgets, run)
    run.end()
    return 0
