"""Which chunks of a one-layer group go through its norm and k/v projections together."""

from __future__ import annotations

from collections.abc import Sequence

from chunkdist.replay import RngState
from chunkdist.stream.stream import Stream

_MAX_TOKENS = 1024
"""Of several chunks together: small ones keep no processor busy, and large ones need no company."""


def projected_parts(
    stream: Stream, run: range, kept: Sequence[int], rng: Sequence[RngState], *, between_kept: bool
) -> list[range]:
    """The chunks of a dependent run whose keys and values others of the `kept` read, by index, in consecutive
    parts.

    Args:
        rng: By chunk, what its forward began with. Where random numbers were drawn, each chunk is a part.
        between_kept: Kept chunks are in no part but as the first, so that all that later chunks leave for a
            part is complete when the chunk behind it has been backpropagated.
    """
    parts: list[range] = []
    for index in (index for index in run if stream.is_read_later(index, kept)):
        last = parts[-1] if parts else range(0)
        if (
            index == last.stop
            and last
            and stream.chunks[index].end - stream.chunks[last.start].start <= _MAX_TOKENS
            and not (between_kept and index in kept)
            and rng[index].equals(rng[index - 1])
        ):
            parts[-1] = range(last.start, index + 1)
        else:
            parts.append(range(index, index + 1))
    return parts
