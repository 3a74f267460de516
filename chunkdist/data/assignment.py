"""Who trains on which sequences of a global batch: ranks by cost, then streams of a rank by tokens.

Pure functions of the sequences' lengths: every rank computes the same plan, nothing is communicated. After
ChunkFlow (arXiv 2503.02356, section 4.1), with two differences: sequences are not cut, since the engine cuts
streams, and the last chunk of a bin is filled up where that leaves the bins balanced.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from chunkdist.data.cost import SequenceCost

_NO_ROOM = np.iinfo(np.int64).max


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """The streams of one global batch.

    Args:
        streams: By rank and micro-batch, the indices of the sequences of a stream in their order. All ranks
            have the same number of micro-batches; a stream without sequences fills up.
    """

    streams: tuple[tuple[tuple[int, ...], ...], ...]

    @property
    def num_micro_batches(self) -> int:
        return len(self.streams[0])


def assign_sequences(
    lengths: Sequence[int],
    *,
    num_bins: int,
    cost: SequenceCost,
    chunk_size: int | None = None,
    slack: float = 0.05,
) -> list[list[int]]:
    """Sequences to bins of nearly equal cost: the costliest first, each to the cheapest bin.

    Args:
        lengths: Tokens of each sequence.
        chunk_size: Tokens. With it, a sequence rather goes where it fills a bin's last chunk best.
        slack: By how much more than they must, bins may cost for that: as a share of the mean or, if it is
            more, of the costliest sequence.

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
    limit = max(sum(costs) / num_bins, max(costs, default=0.0)) * (1 + slack)
    bin_costs = np.zeros(num_bins)
    bin_tokens = np.zeros(num_bins, dtype=np.int64)
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    for index in sorted(range(len(tokens)), key=lambda index: (-costs[index], index)):
        chosen = int(bin_costs.argmin())
        if chunk_size is not None:
            space = -bin_tokens % chunk_size
            fits = (space >= tokens[index]) & (bin_costs + costs[index] <= limit)
            if fits.any():
                chosen = int(np.where(fits, space, _NO_ROOM).argmin())
        bins[chosen].append(index)
        bin_costs[chosen] += costs[index]
        bin_tokens[chosen] += tokens[index]
    return [sorted(indices) for indices in bins]


def pack_streams(
    lengths: Sequence[int], *, budget_tokens: int, chunk_size: int, num_streams: int = 1
) -> list[list[int]]:
    """Sequences to streams of at most `budget_tokens`, the longest first; a longer one has a stream of its
    own.

    Args:
        num_streams: At least so many; more where they would not fit.

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
    num_streams = max(num_streams, -(-sum(min(length, budget_tokens) for length in lengths) // budget_tokens))
    while (streams := _fit(lengths, order, budget_tokens, chunk_size, num_streams)) is None:
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
) -> BatchPlan:
    """The streams of a global batch's sequences: ranks of nearly equal cost, each stream within its budget.

    A rank's streams come costliest first, so that the micro-batches of ranks that wait for each other after
    each are alike.

    Args:
        budget_tokens: The most tokens of a stream, unless one sequence alone is longer.
        min_micro_batches: The least number of micro-batches of a rank; the rank that needs most sets the
            number for all.
    """
    by_rank: list[list[tuple[int, ...]]] = []
    for indices in assign_sequences(lengths, num_bins=num_ranks, cost=cost, chunk_size=chunk_size):
        own = pack_streams(
            [lengths[index] for index in indices],
            budget_tokens=budget_tokens,
            chunk_size=chunk_size,
            num_streams=min_micro_batches,
        )
        streams = [tuple(indices[position] for position in stream) for stream in own]
        by_rank.append(sorted(streams, key=lambda stream: -sum(cost(lengths[i]) for i in stream)))
    most = max(len(streams) for streams in by_rank)
    return BatchPlan(streams=tuple((*streams, *[()] * (most - len(streams))) for streams in by_rank))


def _fit(
    lengths: Sequence[int], order: Sequence[int], budget_tokens: int, chunk_size: int, num_streams: int
) -> list[list[int]] | None:
    """Best fit into the streams' last chunks, else into the shortest stream; `None`: not all have room."""
    streams: list[list[int]] = [[] for _ in range(num_streams)]
    tokens = [0] * num_streams
    for index in order:
        length = lengths[index]
        room = [s for s in range(num_streams) if tokens[s] == 0 or tokens[s] + length <= budget_tokens]
        if not room:
            return None
        fits = [s for s in room if -tokens[s] % chunk_size >= length]
        chosen = min(fits or room, key=lambda s: (-tokens[s] % chunk_size if fits else tokens[s], s))
        streams[chosen].append(index)
        tokens[chosen] += length
    return sorted(streams, key=lambda stream: not stream)


def _refuse_empty(lengths: Sequence[int]) -> None:
    empty = [index for index, length in enumerate(lengths) if length < 1]
    if empty:
        raise ValueError(f"sequence {empty[0]} has {lengths[empty[0]]} tokens: leave out what has none")
