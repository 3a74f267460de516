"""Sequences to dependent runs of equal chunks, the micro-batches of a pipeline.

After ChunkFlow (arXiv 2503.02356, algorithm 1), with one difference: what the last chunk of a long sequence
leaves empty is filled with short ones. A run is a token stream of its own, so no chunk of one run
reads another's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from chunkdist.data.streams import stream_of
from chunkdist.stream.stream import Stream


@dataclass(frozen=True, kw_only=True)
class Run:
    """One token stream, cut in chunks of which each but the first reads the ones before.

    Args:
        sequences: Indices of its sequences, the longest first; only that one is in more than one chunk.
        lengths: Their tokens.
    """

    sequences: tuple[int, ...]
    lengths: tuple[int, ...]
    chunk_size: int

    @property
    def num_chunks(self) -> int:
        return -(-sum(self.lengths) // self.chunk_size)

    @property
    def num_empty(self) -> int:
        """Slots of the last chunk without a token: filled up, masked, since micro-batches have one shape."""
        return self.num_chunks * self.chunk_size - sum(self.lengths)

    def stream(self) -> Stream:
        """Without what fills it up."""
        return stream_of(self.lengths, self.chunk_size)


def pack_runs(lengths: Sequence[int], chunk_size: int, *, shares_chunks: bool = True) -> tuple[Run, ...]:
    """Best fit, the longest first: a sequence goes where it fills a last chunk best, else it begins a run.

    Args:
        lengths: Tokens of each sequence.
        shares_chunks: Whether a sequence may follow another; else each is a run, and fills no chunk but its
            own.

    Returns:
        The most chunks first. Each sequence is in one run.

    Raises:
        ValueError: no chunk size, or a sequence without tokens.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size}: write at least 1")
    empty = [index for index, length in enumerate(lengths) if length < 1]
    if empty:
        raise ValueError(f"sequence {empty[0]} has {lengths[empty[0]]} tokens: leave out what has none")
    runs: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        fits = [run for run, space in enumerate(room) if space >= lengths[index]]
        if fits and shares_chunks:
            chosen = min(fits, key=lambda run: (room[run], run))
            runs[chosen].append(index)
            room[chosen] -= lengths[index]
        else:
            runs.append([index])
            room.append(-lengths[index] % chunk_size)
    return tuple(
        Run(sequences=tuple(run), lengths=tuple(lengths[index] for index in run), chunk_size=chunk_size)
        for run in runs
    )
