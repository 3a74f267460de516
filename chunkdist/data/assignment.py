"""Who trains on which sequences of a global batch: ranks by cost, then streams of a rank by tokens.

Pure functions of the sequences' lengths, and of what they begin with in common: every rank computes the same
plan, nothing is communicated. After ChunkFlow (arXiv 2503.02356, section 4.1), with three differences:
sequences are not cut, since the engine cuts streams; sequences that share a prefix go where it is, and cost
what they add; and the last chunk of a bin is filled up. The latter two where that leaves the bins balanced.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from chunkdist.data.cost import SequenceCost
from chunkdist.data.prefixes import NO_PREFIXES, HeldPrefixes, SharedPrefixes

_NO_ROOM = np.iinfo(np.int64).max


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """The streams of one global batch.

    Args:
        streams: By rank and micro-batch, the indices of the sequences of a stream in their order. All ranks
            have the same number of micro-batches; a stream without sequences fills up.
        shared: By rank, micro-batch and sequence, its first tokens that one before it in the stream begins
            with, too; empty: there are none.
    """

    streams: tuple[tuple[tuple[int, ...], ...], ...]
    shared: tuple[tuple[tuple[int, ...], ...], ...] = ()

    @property
    def num_micro_batches(self) -> int:
        return len(self.streams[0])

    def computed(self, lengths: Sequence[int]) -> list[list[list[tuple[int, int]]]]:
        """By rank, micro-batch and sequence: its tokens, and how many of the first ones are shared.

        Args:
            lengths: Tokens of the sequences that the indices mean.
        """
        shared = self.shared or tuple(tuple((0,) * len(s) for s in streams) for streams in self.streams)
        return [
            [
                [(lengths[index], num) for index, num in zip(stream, nums, strict=True)]
                for stream, nums in zip(*of_rank, strict=True)
            ]
            for of_rank in zip(self.streams, shared, strict=True)
        ]


def assign_sequences(
    lengths: Sequence[int],
    *,
    num_bins: int,
    cost: SequenceCost,
    chunk_size: int | None = None,
    slack: float = 0.05,
    prefixes: SharedPrefixes = NO_PREFIXES,
) -> list[list[int]]:
    """Sequences to bins of nearly equal cost: the costliest first, each to the bin that has most of its
    prefix, else to the cheapest.

    Args:
        lengths: Tokens of each sequence.
        chunk_size: Tokens. With it, a sequence rather goes where it fills a bin's last chunk best.
        slack: By how much more than they must, bins may cost for that, or for a shared prefix: as a share of
            the mean or, if it is more, of the costliest sequence.
        prefixes: What sequences begin with in common, by their index.

    Returns:
        For each bin, the indices of its sequences, ascending. Each index is there once.

    Raises:
        ValueError: no bin, or a sequence without tokens.
    """
    if num_bins < 1:
        raise ValueError(f"num_bins={num_bins}: write at least 1")
    _refuse_empty(lengths)
    tokens = [int(length) for length in lengths]
    costs = [float(cost(length)) for length in tokens]
    least = sum(map(cost, tokens, _in_one(prefixes, range(len(tokens)))))
    limit = max(least / num_bins, max(costs, default=0.0)) * (1 + slack)
    held = HeldPrefixes(prefixes)
    bin_costs = np.zeros(num_bins)
    bin_tokens = np.zeros(num_bins, dtype=np.int64)
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    for index in sorted(range(len(tokens)), key=lambda index: (-costs[index], index)):
        added, new = np.full(num_bins, costs[index]), np.full(num_bins, tokens[index])
        for number, shared in held.shared(index).items():
            added[number], new[number] = cost(tokens[index], shared), tokens[index] - shared
        within = bin_costs + added <= limit
        space = -bin_tokens % (chunk_size or 1)
        if (has_prefix := within & (new < tokens[index])).any():
            most = has_prefix & (new == new[has_prefix].min())
            chosen = int(np.where(most, bin_costs, np.inf).argmin())
        elif (fits := within & (space >= new)).any():
            chosen = int(np.where(fits, space, _NO_ROOM).argmin())
        else:
            chosen = int((bin_costs + added).argmin())
        bins[chosen].append(index)
        held.put(index, chosen)
        bin_costs[chosen] += added[chosen]
        bin_tokens[chosen] += new[chosen]
    return [sorted(indices) for indices in bins]


def pack_streams(
    lengths: Sequence[int],
    *,
    budget_tokens: int,
    chunk_size: int,
    num_streams: int = 1,
    prefixes: SharedPrefixes = NO_PREFIXES,
) -> list[list[int]]:
    """Sequences to streams of at most `budget_tokens`, the longest first; a longer one has a stream of its
    own, but for those that share its prefix.

    Args:
        num_streams: At least so many; more where they would not fit.
        prefixes: As for `assign_sequences`; a stream has what is shared once.

    Returns:
        For each stream, the indices of its sequences, the longest first; empty ones are at the end.

    Raises:
        ValueError: a count that is none, or a sequence without tokens.
    """
    counts = {"budget_tokens": budget_tokens, "chunk_size": chunk_size, "num_streams": num_streams}
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name}={value}: write at least 1")
    _refuse_empty(lengths)
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    new = [length - num for length, num in zip(lengths, _in_one(prefixes, range(len(lengths))), strict=True)]
    num_streams = max(num_streams, -(-sum(min(num, budget_tokens) for num in new) // budget_tokens))
    while (streams := _fit(lengths, order, budget_tokens, chunk_size, num_streams, prefixes)) is None:
        num_streams += 1
    return streams


def plan_batch(
    lengths: Sequence[int],
    *,
    num_ranks: int,
    cost: SequenceCost,
    budget_tokens: int,
    chunk_size: int,
    min_micro_batches: int = 1,
    prefixes: SharedPrefixes = NO_PREFIXES,
) -> BatchPlan:
    """The streams of a global batch's sequences: ranks of nearly equal cost, each stream within its budget.

    A rank's streams come costliest first, so that the micro-batches of ranks that wait for each other after
    each are alike.

    Args:
        budget_tokens: The most tokens of a stream, unless one sequence alone is longer.
        min_micro_batches: The least number of micro-batches of a rank; the rank that needs most sets the
            number for all.
        prefixes: As for `assign_sequences`.
    """
    by_rank: list[list[tuple[int, ...]]] = []
    bins = assign_sequences(lengths, num_bins=num_ranks, cost=cost, chunk_size=chunk_size, prefixes=prefixes)
    for indices in bins:
        own = pack_streams(
            [lengths[index] for index in indices],
            budget_tokens=budget_tokens,
            chunk_size=chunk_size,
            num_streams=min_micro_batches,
            prefixes=prefixes.among(indices),
        )
        streams = [tuple(indices[position] for position in stream) for stream in own]
        by_rank.append(sorted(streams, key=lambda stream: -_cost_of(stream, lengths, cost, prefixes)))
    most = max(len(streams) for streams in by_rank)
    planned = tuple((*streams, *[()] * (most - len(streams))) for streams in by_rank)
    shared = tuple(tuple(_in_one(prefixes, stream) for stream in streams) for streams in planned)
    return BatchPlan(streams=planned, shared=shared)


def _in_one(prefixes: SharedPrefixes, indices: Sequence[int]) -> tuple[int, ...]:
    return prefixes.in_one(indices) if prefixes.paths else (0,) * len(indices)


def _cost_of(
    stream: Sequence[int], lengths: Sequence[int], cost: SequenceCost, prefixes: SharedPrefixes
) -> float:
    return sum(map(cost, (lengths[index] for index in stream), _in_one(prefixes, stream)))


def _fit(
    lengths: Sequence[int],
    order: Sequence[int],
    budget_tokens: int,
    chunk_size: int,
    num_streams: int,
    prefixes: SharedPrefixes,
) -> list[list[int]] | None:
    """Where most of the prefix is, best fit into the streams' last chunks, else into the shortest stream;
    `None`: not all have room."""
    streams: list[list[int]] = [[] for _ in range(num_streams)]
    tokens = [0] * num_streams
    held = HeldPrefixes(prefixes)
    for index in order:
        shared = held.shared(index)
        new = [lengths[index] - shared.get(s, 0) for s in range(num_streams)]
        room = [s for s in range(num_streams) if tokens[s] == 0 or tokens[s] + new[s] <= budget_tokens]
        if not room:
            return None
        least = min(new[s] for s in room)
        room = [s for s in room if new[s] == least]
        fits = [s for s in room if -tokens[s] % chunk_size >= new[s]]
        chosen = min(fits or room, key=lambda s: (-tokens[s] % chunk_size if fits else tokens[s], s))
        streams[chosen].append(index)
        held.put(index, chosen)
        tokens[chosen] += new[chosen]
    return sorted(streams, key=lambda stream: not stream)


def _refuse_empty(lengths: Sequence[int]) -> None:
    empty = [index for index, length in enumerate(lengths) if length < 1]
    if empty:
        raise ValueError(f"sequence {empty[0]} has {lengths[empty[0]]} tokens: leave out what has none")
