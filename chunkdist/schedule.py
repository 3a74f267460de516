"""A token stream, its segments, and its chunks. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass


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


@dataclass(frozen=True, kw_only=True)
class Stream:
    """The tokens of one forward.

    Args:
        num_tokens: Tokens of a row.
        chunks: Ascending and adjacent; they cover all tokens.
        segment_starts: For each row, the first token of each of its segments, ascending, beginning with 0.
    """

    num_tokens: int
    chunks: tuple[Chunk, ...]
    segment_starts: tuple[tuple[int, ...], ...]
