"""What the queries of a chunk see, in parts that a kernel takes.

The first part is each segment's own tokens, causally. Where a segment goes on from an earlier one, whose
tokens lie elsewhere in the stream, they are a part each: the queries, or those whose window reaches so far,
see all of them.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

from chunkdist.attention.base import Span
from chunkdist.stream.stream import Chunk, Stream


@dataclass(frozen=True)
class Part:
    """Queries, counted from the chunk's first token, and the keys that they see.

    Args:
        keys: In the stream.
        spans: As in `AttentionRow`, of these queries and keys.
        gap: As in `AttentionRow`.
    """

    queries: slice
    keys: Chunk
    spans: tuple[Span, ...]
    gap: int | None = None


def visible(stream: Stream, chunk: Chunk, row: int, window: int | None, block: int | None) -> list[Part]:
    """The parts of a row. Blocks of `block` tokens, counted from the start of a segment, are to attention
    what segments are; there are none in trees."""
    starts = stream.segment_starts[row]
    ends = (*starts[1:], stream.num_tokens)
    if block is not None:
        cuts = [range(start, end, block) for start, end in zip(starts, ends, strict=True)]
        starts = tuple(start for cut in cuts for start in cut)
        ends = (*starts[1:], stream.num_tokens)
    first = bisect_right(starts, chunk.start) - 1
    origin, spans = None, []
    for seg_start, seg_end in zip(starts[first:], ends[first:], strict=True):
        q_start, q_end = max(seg_start, chunk.start), min(seg_end, chunk.end)
        if q_start >= q_end:
            break
        k_start = seg_start if window is None else max(seg_start, q_start - window + 1)
        origin = k_start if origin is None else origin
        spans.append(Span(q_start - chunk.start, q_end - chunk.start, k_start - origin, q_end - origin))
    assert origin is not None
    own = Part(slice(0, chunk.num_tokens), Chunk(origin, chunk.end), tuple(spans))
    return (
        [own, *_ancestors(stream, chunk, range(first, first + len(spans)), window)]
        if stream.branches
        else [own]
    )


def _ancestors(stream: Stream, chunk: Chunk, segments: range, window: int | None) -> list[Part]:
    """Without a window, neighbouring segments that go on from the same tokens are in one part."""
    (starts,) = stream.segment_starts
    found: dict[tuple[Chunk, int], tuple[int, int, int]] = {}
    for segment in segments:
        first = max(starts[segment], chunk.start)
        last = min((*starts, stream.num_tokens)[segment + 1], chunk.end)
        gap = first - starts[segment]
        for part in stream.ancestors(segment):
            keys, end = part, last
            if window is not None:
                reach = window - 1 - gap
                keys, end = Chunk(max(part.start, part.end - reach), part.end), min(last, first + reach)
                if reach <= 0:
                    break
            same = (keys, segment if window is not None else 0)
            found[same] = (found[same][0] if same in found else first, end, gap)
            gap += part.num_tokens
    return [
        Part(
            slice(start - chunk.start, end - chunk.start),
            keys,
            (Span(0, end - start, 0, keys.num_tokens),),
            gap,
        )
        for (keys, _), (start, end, gap) in found.items()
    ]
