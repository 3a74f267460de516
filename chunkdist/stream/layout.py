"""The map between a caller's rows and the one stream that is computed for them.

A token's hidden state depends on its path alone: the tokens before it in its own sequence. So padding is
left out, and paths that several sequences share are in the stream once. Tokens that go on from a path in
the order of the stream need no segment of their own: a segment is a sequence, or the rest of one behind what
it shares with a sequence before it.
"""

from __future__ import annotations

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
    min_shared: int | None = None,
) -> Layout:
    """The layout of sequences in rows (B, T).

    Args:
        device: Of the layout's tensors. They go there without a wait.
        keys: On the CPU, by sequence, what tells its tokens apart, (tokens, any) each. Not read without
            `min_shared`.
        min_shared: Equal beginnings of at least so many tokens are shared; `None`: none are, and sequences
            come in their order.
    """
    sequences = [place for place in sequences if place.start < place.end]
    order = _by_path(keys) if min_shared is not None else range(len(sequences))
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
        shared = 0 if last is None or min_shared is None else _num_equal(keys[last], keys[index])
        path = _beginning(path, shared if min_shared is not None and shared >= min_shared else 0)
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


def _by_path(keys: Sequence[Tensor]) -> list[int]:
    """Sequences in an order in which each one follows one that it shares the most with."""
    return sorted(range(len(keys)), key=lambda index: (keys[index].numpy().tobytes(), index))


def _num_equal(x: Tensor, y: Tensor) -> int:
    """How many tokens two sequences have in common before they part."""
    length = min(x.shape[0], y.shape[0])
    differs = (x[:length] != y[:length]).flatten(1).any(1)
    return int(differs.to(torch.uint8).argmax()) if bool(differs.any()) else length


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
