"""How even and how full streams are over many ranks, by the cost model alone: no tensor is made."""

from __future__ import annotations

import time
from typing import Any

from transformers import LlamaConfig

from chunkdist.bench.environment import LLAMA_3_8B
from chunkdist.data.assignment import assign_sequences, plan_batch
from chunkdist.data.cost import SequenceCost
from chunkdist.data.long_tail import LONGEST, SEED, long_tailed_lengths

NUM_SEQUENCES, BATCH_SEQUENCES = 100_000, 256
NUM_RANKS, CHUNK_SIZES = (8, 64), (256, 512, 1024, 2048, 4096)


def simulate(*, num_batches: int) -> dict[str, Any]:
    """Global batches of the committed sample, over ranks. Of each setting:

    - `largest_imbalance`: largest cost of a rank over the mean, in the `num_even` batches in which no single
      sequence costs more than the mean (`None`: there are none);
    - `largest_over_bound`: in all batches, the largest cost of a rank over the larger of the mean and the
      costliest sequence, below which no assignment can come;
    - `empty_share`: slots of chunks without a token; `empty_share_at_best`: if all ranks' tokens of a batch
      were one stream.
    """
    lengths = long_tailed_lengths(NUM_SEQUENCES)
    batches = [lengths[n * BATCH_SEQUENCES : (n + 1) * BATCH_SEQUENCES] for n in range(num_batches)]
    model_config: dict[str, Any] = dict(LLAMA_3_8B)
    cost = SequenceCost.of_config(LlamaConfig(**model_config))
    rows = [_row(batches, cost, ranks, size) for ranks in NUM_RANKS for size in CHUNK_SIZES]
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
        "batch_sequences": BATCH_SEQUENCES,
        "num_batches": num_batches,
        "assign_4096_to_512_s": time.perf_counter() - start,
        "rows": rows,
    }


def _row(batches: list[list[int]], cost: SequenceCost, num_ranks: int, chunk_size: int) -> dict[str, Any]:
    even, over_bound = [], []
    num_tokens = slots = best_slots = 0
    for lengths in batches:
        costs = [cost(length) for length in lengths]
        plan = plan_batch(
            lengths, num_ranks=num_ranks, cost=cost, budget_tokens=LONGEST, chunk_size=chunk_size
        )
        largest = max(sum(costs[i] for stream in streams for i in stream) for streams in plan.streams)
        mean = sum(costs) / num_ranks
        over_bound.append(largest / max(mean, *costs))
        if max(costs) <= mean:
            even.append(largest / mean)
        num_tokens += sum(lengths)
        best_slots += _slots(sum(lengths), chunk_size)
        for stream in (stream for streams in plan.streams for stream in streams):
            slots += _slots(sum(lengths[index] for index in stream), chunk_size)
    return {
        "num_ranks": num_ranks,
        "chunk_size": chunk_size,
        "num_even": len(even),
        "largest_imbalance": max(even, default=None),
        "largest_over_bound": max(over_bound),
        "empty_share": 1 - num_tokens / slots,
        "empty_share_at_best": 1 - num_tokens / best_slots,
    }


def _slots(num_tokens: int, chunk_size: int) -> int:
    return -(-num_tokens // chunk_size) * chunk_size
