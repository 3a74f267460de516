"""A token stream, its segments, and its chunks. Standard library only."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise


@dataclass(frozen=True)
class Chunk:
    """Tokens [start, end) of every row."""

    start: int
    end: int

    @property
    def num_tokens(self) -> int:
        return self.end - self.start


def cut(num_tokens: int, chunk_size: int) -> tuple[Chunk, ...]:
    """Chunks of `chunk_size` tokens; the last one may be shorter."""
    return tuple(
        Chunk(start, min(start + chunk_size, num_tokens)) for start in range(0, num_tokens, chunk_size)
    )


def tokens_of_chunks(chunk_size: int) -> int:
    """Of all chunks but the last of a segment, where chunks end with segments: 1 means 2."""
    return max(2, chunk_size)


def cut_segments(starts: Sequence[int], num_tokens: int, chunk_size: int) -> tuple[Chunk, ...]:
    """Chunks of `chunk_size` tokens that end where segments do, too.

    None continues a segment by a single token: such a token goes with the chunk before it (and `chunk_size=1`
    means 2). For one token, layers with state take the path of generation, which changes states in place.
    """
    chunks: list[Chunk] = []
    for start, end in zip(starts, (*starts[1:], num_tokens), strict=True):
        first = len(chunks)
        chunks += [
            Chunk(start + c.start, start + c.end) for c in cut(end - start, tokens_of_chunks(chunk_size))
        ]
        if len(chunks) - first > 1 and chunks[-1].num_tokens == 1:
            chunks[-2:] = [Chunk(chunks[-2].start, end)]
    return tuple(chunks)


@dataclass(frozen=True, kw_only=True)
class Stream:
    """The tokens of one forward.

    Args:
        num_tokens: Tokens of a row.
        chunks: Ascending and adjacent; they cover all tokens.
        segment_starts: For each row, the first token of each of its segments, ascending, beginning with 0.
        whole: The stream of a sequence group, of which this is one rank's part: an equal part of each chunk,
            in the same order. `segment_starts` are the whole's. `None`: this is all there is.
        branches: For each segment of the one row, the end of the tokens that it goes on from, in an earlier
            segment; 0: there are none. Trees are whole, and in depth-first order. Empty: each segment is a
            sequence.
    """

    num_tokens: int
    chunks: tuple[Chunk, ...]
    segment_starts: tuple[tuple[int, ...], ...]
    whole: Stream | None = None
    branches: tuple[int, ...] = ()

    def part_of(self, num_ranks: int) -> Stream:
        """What a rank of a sequence group has of this stream."""
        chunks = tuple(Chunk(chunk.start // num_ranks, chunk.end // num_ranks) for chunk in self.chunks)
        return Stream(
            num_tokens=self.num_tokens // num_ranks,
            chunks=chunks,
            segment_starts=self.segment_starts,
            whole=self,
        )

    def in_whole(self, tokens: Chunk) -> Chunk:
        """The tokens of the whole stream that this rank's `tokens`, whole chunks, are a part of."""
        if self.whole is None:
            return tokens
        num_ranks = self.whole.num_tokens // self.num_tokens
        return Chunk(tokens.start * num_ranks, tokens.end * num_ranks)

    @property
    def longest_sequence(self) -> int:
        """In tokens, of all rows."""
        if self.whole is not None:
            return self.whole.longest_sequence
        return max(
            end - start + sum(part.num_tokens for part in self.ancestors(index))
            for starts in self.segment_starts
            for index, (start, end) in enumerate(pairwise((*starts, self.num_tokens)))
        )

    def ancestors(self, segment: int) -> tuple[Chunk, ...]:
        """The tokens of its sequence before a segment, the nearest first."""
        return self._ancestors[segment] if self.branches else ()

    def before(self, chunk: Chunk) -> int | None:
        """Where the tokens of its sequence end that come before a chunk that lies in one segment; `None`:
        there are none."""
        starts = self.segment_starts[0]
        segment = bisect_right(starts, chunk.start) - 1
        if starts[segment] < chunk.start:
            return chunk.start
        return (self.branches[segment] or None) if self.branches else None

    def behind(self, chunk: Chunk) -> tuple[int, ...]:
        """Where the chunks begin that go on from the last token of a chunk that lies in one segment."""
        return self._behind.get(chunk.end, ())

    def first_visible(self, chunk: Chunk) -> int:
        """The first token, of any row, that a query of the chunk sees: where the sequence, or the tree, of
        its first token starts."""
        first = [bisect_right(starts, chunk.start) - 1 for starts in self.segment_starts]
        if before := self.ancestors(first[0]):
            return before[-1].start
        return min(starts[index] for starts, index in zip(self.segment_starts, first, strict=True))

    def is_read_later(self, index: int, chunks: Sequence[int]) -> bool:
        """Whether a later chunk, among `chunks` (ascending), sees a token of chunk `index`: the next one, if
        any does. In trees, of which all chunks run, another one may."""
        if self.whole is not None:
            return self.whole.is_read_later(index, chunks)
        if self.branches:
            return self._readers[index] > 0
        position = bisect_right(chunks, index)
        return position < len(chunks) and self._reach_before(chunks[position], index)

    def runs(self) -> tuple[range, ...]:
        """Dependent runs: consecutive chunks, by index, that hold whole sequences and trees. Each but the
        last is read later, or between two that one tree needs."""
        every = range(len(self.chunks))
        ends = [
            index + 1
            for index in every
            if index + 1 == len(every) or not self._reach_before(index + 1, index)
        ]
        return tuple(range(start, end) for start, end in zip([0, *ends], ends, strict=False))

    def _reach_before(self, later: int, earlier: int) -> bool:
        if self.whole is not None:
            return self.whole._reach_before(later, earlier)
        return self.first_visible(self.chunks[later]) < self.chunks[earlier].end

    @cached_property
    def _behind(self) -> dict[int, tuple[int, ...]]:
        found: dict[int, tuple[int, ...]] = {}
        for chunk in self.chunks:
            if (end := self.before(chunk)) is not None:
                found[end] = (*found.get(end, ()), chunk.start)
        return found

    @cached_property
    def _ancestors(self) -> list[tuple[Chunk, ...]]:
        (starts,) = self.segment_starts
        found: list[tuple[Chunk, ...]] = []
        for end in self.branches:
            parent = bisect_right(starts, end - 1) - 1
            found.append((Chunk(starts[parent], end), *found[parent]) if end else ())
        return found

    @cached_property
    def _readers(self) -> list[int]:
        """By chunk, how many parts of later chunks' sequences have tokens in it."""
        (starts,) = self.segment_starts
        chunk_starts = [chunk.start for chunk in self.chunks]
        changes = [0] * (len(self.chunks) + 1)
        for chunk in self.chunks:
            first = bisect_right(starts, chunk.start) - 1
            parts = {Chunk(starts[first], chunk.start)}
            for segment in range(first, bisect_right(starts, chunk.end - 1)):
                parts.update(self.ancestors(segment))
            for part in parts:
                if part.start < (end := min(part.end, chunk.start)):
                    changes[bisect_right(chunk_starts, part.start) - 1] += 1
                    changes[bisect_right(chunk_starts, end - 1)] -= 1
        return list(accumulate(changes[:-1]))

    def tokens_of(self, chunks: range) -> Chunk:
        """The tokens of consecutive chunks, by index."""
        return Chunk(self.chunks[chunks[0]].start, self.chunks[chunks[-1]].end)

    def retained(self, num_chunks: int) -> range:
        """The last `num_chunks` chunks, by index: the first that the backward needs, and lets go."""
        return range(max(0, len(self.chunks) - num_chunks), len(self.chunks))
