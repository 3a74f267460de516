"""The longest sample comes first, so that too little memory is noticed at once."""

from __future__ import annotations

from chunkdist.data.cost import SequenceCost
from chunkdist.data.sampler import LongestFirst, StreamBatchSampler, longest_to_front
from tests.helpers.models import tiny_llama

LENGTHS = [5, 9, 70, 1, 70, 8]


def test_the_first_of_the_longest_changes_places() -> None:
    assert longest_to_front([3, 0, 4, 1, 2, 5], LENGTHS) == [4, 0, 3, 1, 2, 5]
    assert longest_to_front([], []) == []
    sampler = LongestFirst([0, 1, 2, 3, 4, 5], LENGTHS)
    assert list(sampler) == [2, 1, 0, 3, 4, 5]
    assert len(sampler) == 6


def test_streams() -> None:
    for shuffle in (True, False):
        sampler = StreamBatchSampler(
            LENGTHS,
            batch_sequences=2,
            num_ranks=1,
            rank=0,
            cost=SequenceCost.of(tiny_llama()),
            budget_tokens=80,
            chunk_size=16,
            shuffle=shuffle,
            longest_first=True,
        )
        for epoch in range(6):
            sampler.set_epoch(epoch)
            items = [{index for stream in item for index in stream} for item in sampler]
            assert set.union(*items) == set(range(6))
            assert bool(items[0] & {2, 4}) == shuffle
