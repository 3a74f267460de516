"""Sharing rows cuts a rank's memory by the ranks; what it sends does not grow with the number of chunks."""

from __future__ import annotations

from typing import Any

import pytest

from chunkdist.sharding.collectives import GATHER
from tests.distributed.ranks import Ranks
from tests.distributed.sequence_costs import ALL_TO_ALL, NUM_TOKENS, draws, peaks, traffic

NUM_LAYERS = 2


@pytest.mark.parametrize("rebuild_kv", [False, True])
def test_bytes_do_not_grow_with_the_chunks(two_ranks: Ranks, rebuild_kv: bool) -> None:
    alone, *_ = two_ranks.run(traffic, 16, False, rebuild_kv)
    several = {size: two_ranks.run(traffic, size, True, rebuild_kv)[0] for size in (64, 16)}
    for size, costs in several.items():
        exchanged, num_chunks = costs.by_kind[ALL_TO_ALL], NUM_TOKENS // size
        # forward, rerun and backward of a cell, two each; K/V of all chunks but the last; the decoder's ends
        rebuilt = NUM_LAYERS * (num_chunks - 1) * rebuild_kv
        assert exchanged.count == 6 * NUM_LAYERS * num_chunks + rebuilt + 2
        at_the_ends = 2 * NUM_TOKENS // 2 * 32 * 4
        # The formula takes K/V of all chunks to be made again.
        bound = pytest.approx(costs.predicted_bytes, rel=0.06 if rebuild_kv else 0)
        assert exchanged.whole_bytes - at_the_ends == bound
        gathered = costs.by_kind[GATHER]
        assert gathered.count == alone.by_kind[GATHER].count + 3  # facts, ids, labels
        assert gathered.whole_bytes == alone.by_kind[GATHER].whole_bytes + 2 * 24 + 8 * NUM_TOKENS + 2 * 8
    assert alone.by_kind.get(ALL_TO_ALL) is None
    few, many = (several[size].by_kind[ALL_TO_ALL].whole_bytes for size in (64, 16))
    assert many <= (1.06 if rebuild_kv else 1) * few


@pytest.mark.parametrize(
    "settings",
    [
        {"keep_attention": False},
        {"keep_attention": False, "layers_per_group": 2, "retained_chunks": 2},
        {"keep_attention": True, "rebuild_kv": False},
        {"keep_attention": False, "layers_per_group": "all", "retained_chunks": 1},
    ],
)
def test_memory_is_cut_by_the_ranks(two_ranks: Ranks, settings: dict[str, Any]) -> None:
    for alone, shared, formula in two_ranks.run(peaks, 4096, settings):
        assert shared <= 1.05 * alone / 2
        assert formula == pytest.approx(shared, rel=0.05)


def test_groups_of_other_lengths_do_not_hang(four_ranks: Ranks) -> None:
    assert min(four_ranks.run(draws, 200)) >= 200
