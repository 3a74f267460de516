"""How even and how full streams are over many ranks, by the cost model alone: no tensor is made."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from transformers import LlamaConfig

from chunkdist.bench.sizes import LLAMA_3_8B
from chunkdist.data.assignment import assign_sequences, plan_batch
from chunkdist.data.cost import SequenceCost
from chunkdist.data.long_tail import LONGEST, SEED, long_tailed_lengths

NUM_SEQUENCES = 100_000
SETTINGS = ((8, 256, LONGEST), (64, 256, LONGEST), (64, 2048, 8192))
"""Ranks, sequences of a global batch, tokens of the longest sequence that is not left out."""
CHUNK_SIZES = (512, 1024, 1536, 2048, 4096)
MOST = 1.05
"""What the costliest rank may cost, over the least that an assignment can reach."""


def simulate(*, max_batches: int | None = None) -> dict[str, Any]:
    """Global batches of the committed sample, over ranks. Of each setting:

    - `largest_imbalance`: largest cost of a rank over the mean, in the `num_even` batches in which no single
      sequence costs more than the mean (`None`: there are none);
    - `largest_over_bound`, `mean_over_bound`: in all batches, the largest cost of a rank over the larger of
      the mean and the costliest sequence, below which no assignment can come;
    - `mean_imbalance_of_others`: the same as imbalance, of the ranks that have no sequence above the mean;
    - `empty_share`: slots of chunks without a token; `empty_share_at_best`: a bound for every assignment
      whose ranks cost at most `MOST` times the least.
    """
    lengths = long_tailed_lengths(NUM_SEQUENCES)
    model_config: dict[str, Any] = dict(LLAMA_3_8B)
    cost = SequenceCost.of_config(LlamaConfig(**model_config))
    rows = []
    for num_ranks, batch_sequences, longest in SETTINGS:
        kept = [length for length in lengths if length <= longest]
        starts = range(0, len(kept) - batch_sequences + 1, batch_sequences)[:max_batches]
        batches = [kept[start : start + batch_sequences] for start in starts]
        for size in CHUNK_SIZES:
            setting = {"num_ranks": num_ranks, "batch_sequences": batch_sequences, "longest": longest}
            rows.append(setting | _row(batches, cost, num_ranks, size))
    start = time.perf_counter()
    assign_sequences(lengths[:4096], num_bins=512, cost=cost, chunk_size=1024)
    return {
        "sample": {
            "num_sequences": NUM_SEQUENCES,
            "seed": SEED,
            "share_below_4096": sum(length < 4096 for length in lengths) / len(lengths),
            "longest": max(lengths),
            "mean": sum(lengths) / len(lengths),
        },
        "assign_4096_to_512_s": time.perf_counter() - start,
        "rows": rows,
    }


def fewest_chunks(
    lengths: Sequence[int], cost: SequenceCost, *, num_ranks: int, chunk_size: int, most: float = MOST
) -> int:
    """No assignment has fewer chunks, if no rank costs more than `most` times the larger of the mean and the
    costliest sequence. Two arguments: slots that a long sequence leaves empty in its last chunk, where its
    rank has no cost left to fill them; and tokens that do not fit into the full chunks of all ranks."""
    costs = sorted(((cost(length), length) for length in lengths), reverse=True)
    limit = max(sum(own for own, _ in costs) / num_ranks, costs[0][0]) * most
    alone = [costs[0]]  # no two of these fit on one rank
    for own, length in costs[1:num_ranks]:
        if own + alone[-1][0] <= limit:
            break
        alone.append((own, length))
    room = [(length, length + int((limit - own) / cost.per_token)) for own, length in alone]
    room += [(0, int(limit / cost.per_token))] * (num_ranks - len(alone))
    unfilled = sum(
        -most_tokens % chunk_size
        for tokens, most_tokens in room
        if tokens % chunk_size and most_tokens // chunk_size == tokens // chunk_size
    )
    fewest = -(-(sum(lengths) + unfilled) // chunk_size)
    num_full = sum(most_tokens // chunk_size for _, most_tokens in room)
    left, num_partial = sum(lengths) - num_full * chunk_size, 0
    for partial in sorted((most_tokens % chunk_size for _, most_tokens in room), reverse=True):
        if left <= 0:
            break
        left, num_partial = left - partial, num_partial + 1
    return max(fewest, num_full + num_partial) if num_partial else fewest


def _row(batches: list[list[int]], cost: SequenceCost, num_ranks: int, chunk_size: int) -> dict[str, Any]:
    even: list[float] = []
    over_bound: list[float] = []
    of_others: list[float] = []
    num_tokens = num_chunks = best_chunks = 0
    for lengths in batches:
        costs = [cost(length) for length in lengths]
        plan = plan_batch(
            lengths, num_ranks=num_ranks, cost=cost, budget_tokens=LONGEST, chunk_size=chunk_size
        )
        by_rank = [[index for stream in streams for index in stream] for streams in plan.streams]
        rank_costs = [sum(costs[index] for index in own) for own in by_rank]
        mean = sum(costs) / num_ranks
        over_bound.append(max(rank_costs) / max(mean, *costs))
        if max(costs) <= mean:
            even.append(max(rank_costs) / mean)
        others = [
            own_cost
            for own_cost, own in zip(rank_costs, by_rank, strict=True)
            if all(costs[index] <= mean for index in own)
        ]
        if sum(others):
            of_others.append(max(others) * len(others) / sum(others))
        num_tokens += sum(lengths)
        best_chunks += fewest_chunks(lengths, cost, num_ranks=num_ranks, chunk_size=chunk_size)
        for stream in (stream for streams in plan.streams for stream in streams):
            num_chunks += -(-sum(lengths[index] for index in stream) // chunk_size)
    return {
        "chunk_size": chunk_size,
        "num_batches": len(batches),
        "num_even": len(even),
        "largest_imbalance": max(even, default=None),
        "largest_over_bound": max(over_bound),
        "mean_over_bound": sum(over_bound) / len(over_bound),
        "mean_imbalance_of_others": sum(of_others) / max(1, len(of_others)),
        "empty_share": 1 - num_tokens / (num_chunks * chunk_size),
        "empty_share_at_best": 1 - num_tokens / (best_chunks * chunk_size),
    }
