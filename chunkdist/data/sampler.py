"""The streams of an epoch, as a batch sampler: which sequences one rank gets, step after step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch.utils.data import BatchSampler, Sampler

from chunkdist.data.assignment import BatchPlan, plan_batch
from chunkdist.data.cost import SequenceCost
from chunkdist.data.prefixes import NO_PREFIXES, SharedPrefixes


def longest_to_front(order: list[int], lengths: Sequence[int]) -> list[int]:
    """`order` with the first longest of its samples in exchange for its first: too little memory is noticed
    in the first step, not after hours."""
    order = list(order)
    if order:
        position = max(range(len(order)), key=lambda position: lengths[order[position]])
        order[0], order[position] = order[position], order[0]
    return order


def shuffled(lengths: Sequence[int], seed: int, *, longest_first: bool) -> list[int]:
    """An order of the samples, the same for the same seed."""
    order: list[int] = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed)).tolist()
    return longest_to_front(order, lengths) if longest_first else order


class LongestFirst(Sampler[int]):
    """Another sampler's order, each time with the longest sample first."""

    def __init__(self, sampler: Any, lengths: Sequence[int]) -> None:
        self._sampler, self._lengths = sampler, lengths

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[int]:
        return iter(longest_to_front(list(self._sampler), self._lengths))

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self._sampler, "set_epoch"):
            self._sampler.set_epoch(epoch)


class StreamBatchSampler(BatchSampler):
    """Global batches of a shuffled epoch, cut into streams; yields those of one rank.

    Each optimizer step is `num_slots` items, each a list of streams, each stream a tuple of indices. All
    ranks yield the same number of items, with the same number of streams in each. Every sequence of the epoch
    is in one stream of one rank; the last global batch may be smaller. What is yielded follows from the epoch
    alone, so that skipping the first items continues an epoch where it was left.

    Args:
        lengths: Tokens of every sequence.
        batch_sequences: Sequences of a global batch.
        num_slots: Items of an optimizer step (gradient accumulation).
        shuffle: Another order in each epoch; else that of the data.
        longest_first: Shuffled epochs begin with the longest sequence.
        prefixes: What some sequences begin with in common, by their place among the indices that it is given;
            `None`: nothing that would be computed once.
    """

    batch_size = 1  # accelerate: an item is whole, none is cut to even out the last one
    drop_last = False

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        batch_sequences: int,
        num_ranks: int,
        rank: int,
        cost: SequenceCost,
        budget_tokens: int,
        chunk_size: int,
        num_slots: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        longest_first: bool = False,
        prefixes: Callable[[Sequence[int]], SharedPrefixes] | None = None,
    ) -> None:
        self.lengths = list(lengths)
        self.cost = cost
        self.chunk_size = chunk_size
        self.num_batches = -(-len(self.lengths) // batch_sequences)
        self._batch_sequences = batch_sequences
        self._num_ranks = num_ranks
        self._rank = rank
        self._budget_tokens = budget_tokens
        self._num_slots = num_slots
        self._seed = seed
        self._shuffle = shuffle
        self._longest_first = longest_first
        self._prefixes = prefixes
        self._epoch = 0
        self._order = lru_cache(maxsize=2)(self._new_order)

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return self.num_batches * self._num_slots

    def __iter__(self) -> Iterator[list[tuple[int, ...]]]:  # type: ignore[override]  # indices in streams
        epoch = self._epoch
        for number in range(self.num_batches):
            plan = self.plan(epoch, number)
            streams = plan.streams[self._rank]
            cuts = [slot * len(streams) // self._num_slots for slot in range(self._num_slots + 1)]
            for slot in range(self._num_slots):
                yield list(streams[cuts[slot] : cuts[slot + 1]])

    def plan(self, epoch: int, number: int) -> BatchPlan:
        """The streams of global batch `number` of an epoch, on all ranks."""
        start = number * self._batch_sequences
        own = self._order(epoch)[start : start + self._batch_sequences]
        plan = plan_batch(
            [self.lengths[index] for index in own],
            num_ranks=self._num_ranks,
            cost=self.cost,
            budget_tokens=self._budget_tokens,
            chunk_size=self.chunk_size,
            min_micro_batches=self._num_slots,
            prefixes=NO_PREFIXES if self._prefixes is None else self._prefixes(own),
        )
        return BatchPlan(
            streams=tuple(
                tuple(tuple(own[position] for position in stream) for stream in streams)
                for streams in plan.streams
            ),
            shared=plan.shared,
        )

    def _new_order(self, epoch: int) -> list[int]:
        if not self._shuffle:
            return list(range(len(self.lengths)))
        return shuffled(self.lengths, self._seed + epoch, longest_first=self._longest_first)
