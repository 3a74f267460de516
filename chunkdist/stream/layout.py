"""The map between a caller's rows and the one stream that is computed for them.

A token's hidden state depends on its path alone: the tokens before it in its own sequence. So padding is
left out, and paths that several sequences share are in the stream once. Tokens that go on from a path in
the order of the stream need no segment of their own: a segment is a sequence, or the rest of one behind what
it shares with a sequence before it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SequencePlace:
    """Where a sequence is in the rows: tokens [start, end) of a row."""

    row: int
    start: int
    end: int


@dataclass(frozen=True, kw_only=True)
class PrefixRule:
    """Which tokens that sequences begin with in common are in the stream once.

    Args:
        least: Tokens; fewer are not shared.
        multiple: A branch begins behind a multiple of so many tokens of its path, where chunks that begin
            anew with each branch end, so that the state there is known. Its first chunk, and what follows in
            the segment that it leaves, have two tokens or more, as `cut_segments` wants it.
    """

    least: int = 1
    multiple: int = 1


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Rows (B, T) as a stream of U tokens.

    Args:
        sources: By token of the stream, its place in the flattened rows (U,).
        places: By token of the flattened rows, its place in the stream (B T,). Padding has that of the first
            token: what it gets is any token's, but not zeros, at which the gradient of some losses is 0.
        is_padded: Whether there is padding.
        positions: By token of the stream, its position in its sequence (U,).
        segment_starts, branches: As in `Stream`, of its one row.
        num_passed: Tokens of the sequences; U of them are computed.
    """

    shape: tuple[int, int]
    sources: Tensor
    places: Tensor
    is_padded: bool
    positions: Tensor
    segment_starts: tuple[int, ...]
    branches: tuple[int, ...]
    num_passed: int

    @property
    def num_tokens(self) -> int:
        """U."""
        return self.sources.shape[0]


def lay_out(
    shape: tuple[int, int],
    sequences: Sequence[SequencePlace],
    device: torch.device,
    *,
    keys: Sequence[Tensor] = (),
    rule: PrefixRule | None = None,
) -> Layout:
    """The layout of sequences in rows (B, T).

    Args:
        device: Of the layout's tensors. They go there without a wait.
        keys: On the CPU, by sequence, what tells its tokens apart, (tokens, any) each. Not read without
            `rule`.
        rule: Which equal beginnings are shared; `None`: none are, and sequences come in their order.
    """
    sequences = [place for place in sequences if place.start < place.end]
    order = by_path(keys) if rule is not None else range(len(sequences))
    starts: list[int] = []
    branches: list[int] = []
    sources: list[range] = []
    positions: list[range] = []
    places = torch.zeros(shape, dtype=torch.int64)
    path: list[range] = []
    num_tokens, last = 0, None
    for index in order:
        place = sequences[index]
        length = place.end - place.start
        shared = 0 if last is None or rule is None else num_equal(keys[last], keys[index])
        if rule is not None and shared:
            goes_on = shared == sum(map(len, path)) and path[-1].stop == num_tokens
            is_whole = shared == length or goes_on
            bounds = (*starts, num_tokens)
            shared = shared if is_whole else _where_a_chunk_ends(shared, length, path, bounds, rule.multiple)
            shared = shared if shared >= rule.least else 0
        path = _beginning(path, shared)
        num_shared = sum(map(len, path))
        if num_shared < length:
            new = range(num_tokens, num_tokens + length - num_shared)
            if path and path[-1].stop == num_tokens:
                path[-1] = range(path[-1].start, new.stop)
            else:
                starts.append(num_tokens)
                branches.append(path[-1].stop if path else 0)
                path.append(new)
            first = place.row * shape[1] + place.start
            sources.append(range(first + num_shared, first + length))
            positions.append(range(num_shared, length))
            num_tokens = new.stop
        places[place.row, place.start : place.end] = _joined(path)
        last = index
    num_passed = sum(place.end - place.start for place in sequences)
    return Layout(
        shape=shape,
        sources=_on(device, _joined(sources)),
        places=_on(device, places.flatten()),
        is_padded=num_passed < shape[0] * shape[1],
        positions=_on(device, _joined(positions)),
        segment_starts=tuple(starts),
        branches=tuple(branches) if any(branches) else (),
        num_passed=num_passed,
    )


def by_path(keys: Sequence[Tensor]) -> list[int]:
    """Sequences in an order in which each one follows one that it shares the most with."""
    return sorted(range(len(keys)), key=lambda index: (keys[index].numpy().tobytes(), index))


def num_equal(x: Tensor, y: Tensor) -> int:
    """How many tokens two sequences have in common before they part."""
    length = min(x.shape[0], y.shape[0])
    differs = (x[:length] != y[:length]).flatten(1).any(1)
    return int(differs.to(torch.uint8).argmax()) if bool(differs.any()) else length


def _where_a_chunk_ends(
    shared: int, length: int, path: Sequence[range], bounds: Sequence[int], multiple: int
) -> int:
    """How many of the `shared` tokens of a path a sequence of `length` can branch behind.

    Args:
        bounds: Where the segments so far begin, and where the last one ends.
    """
    shared -= shared % multiple
    while multiple > 1 and shared:
        behind = _beginning(path, shared)[-1].stop
        end_of_segment = bounds[bisect_left(bounds, behind)]
        if length - shared > 1 and end_of_segment - behind != 1:
            break
        shared -= multiple
    return shared


def _beginning(path: Sequence[range], num_tokens: int) -> list[range]:
    """The first tokens of a path."""
    kept = []
    for part in path:
        if num_tokens > 0:
            kept.append(part[:num_tokens])
        num_tokens -= len(part)
    return kept


def _joined(ranges: Sequence[range]) -> Tensor:
    if len(ranges) == 1:
        return torch.arange(ranges[0].start, ranges[0].stop)
    return torch.cat([torch.arange(x.start, x.stop) for x in ranges])


def _on(device: torch.device, x: Tensor) -> Tensor:
    """From pinned memory, since a copy from pageable memory waits for the GPU."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)
