"""Ranks with other memory and other lengths choose one schedule: other groups would be gathered in another
order."""

from __future__ import annotations

from tests.distributed.auto import chosen_by_rank
from tests.distributed.ranks import Ranks

MIB = 2**20


def test_all_ranks_choose_for_the_least_memory_and_the_longest_row(two_ranks: Ranks) -> None:
    rich, poor = 512 * MIB, 16 * MIB
    mixed = two_ranks.run(chosen_by_rank, (rich, poor), (4096, 2048))
    alike = two_ranks.run(chosen_by_rank, (poor, poor), (4096, 4096))
    roomy = two_ranks.run(chosen_by_rank, (rich, rich), (4096, 4096))
    assert mixed[0] == mixed[1] == alike[0] == alike[1]
    assert roomy[0] == roomy[1] != mixed[0]
