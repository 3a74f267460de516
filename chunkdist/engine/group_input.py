"""The hidden states that a group of layers begins with, and cuts of them, on the device or from the host."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from chunkdist.errors import UnsupportedModelError
from chunkdist.stores.by_chunk import TensorsByChunk
from chunkdist.stores.host_memory import HostMemory
from chunkdist.stream.stream import Chunk


class GroupInput:
    """Sees to it that all layers of a group are called with one tensor (B, T, H), unchanged between them."""

    def __init__(self, num_layers: int) -> None:
        self._num_layers = num_layers
        self._first: tuple[Tensor, int] | None = None

    @property
    def hidden(self) -> Tensor:
        assert self._first is not None
        return self._first[0]

    def add(self, hidden: Tensor) -> None:
        """What one layer, the first or a later one, was called with."""
        if self._first is None:
            self._first = hidden, _version_of(hidden)
        first, version = self._first
        same_storage = hidden.untyped_storage()._cdata == first.untyped_storage()._cdata
        if not same_storage or hidden.shape != first.shape or _version_of(hidden) != version:
            raise UnsupportedModelError(
                "the decoder changes the hidden states between its layers: write layers_per_group=1, not "
                f"{self._num_layers}"
            )

    def release(self) -> None:
        self._first = None


Reading = tuple[Chunk, Sequence[TensorsByChunk[Any]]]
"""A chunk whose input is read, and what of its layers comes from the host with it."""


class HostInput:
    """A group's input (B, T, H) on the host, by chunk: each comes back while the one before it is at work.

    Args:
        chunks: Those that are read in the backward.
    """

    def __init__(self, host: HostMemory, hidden: Tensor, chunks: Iterable[Chunk]) -> None:
        self.shape, self.dtype, self.requires_grad = hidden.shape, hidden.dtype, hidden.requires_grad
        self._parts = {chunk: host.put(tokens_of(hidden, chunk)) for chunk in chunks}
        self._order: list[Reading] = []
        self._ahead: Reading | None = None
        self._at_hand: tuple[Chunk, Tensor] | None = None

    def expect(self, order: Iterable[Reading]) -> None:
        """In which order chunks will be read. Others can be read too, but are waited for."""
        self._order = [reading for reading in order if reading[0] in self._parts]

    def tokens_of(self, chunk: Chunk) -> Tensor:
        """(B, T, H); of several chunks, too."""
        if self._at_hand is None or self._at_hand[0] != chunk:
            self._at_hand = None
            self._at_hand = chunk, self._fetch(chunk)
            self._fetch_ahead(chunk)
        return self._at_hand[1]

    def _fetch(self, tokens: Chunk) -> Tensor:
        if (part := self._parts.get(tokens)) is not None:
            return part.get()
        within = [c for c in self._parts if tokens.start <= c.start and c.end <= tokens.end]
        assert sum(c.num_tokens for c in within) == tokens.num_tokens, f"{tokens} is not whole chunks"
        return torch.cat([self._parts[c].get() for c in within], dim=1)

    def _fetch_ahead(self, chunk: Chunk) -> None:
        before, chunks = self._ahead, [expected for expected, _ in self._order]
        if chunk in chunks:
            self._order = self._order[chunks.index(chunk) + 1 :]
        self._ahead = self._order[0] if self._order else None
        if before is not None and before[0] != chunk and before is not self._ahead:
            self._parts[before[0]].leave()
            for tensors in before[1]:
                tensors.leave(before[0].start)
        if self._ahead is not None:
            self._parts[self._ahead[0]].start()
            for tensors in self._ahead[1]:
                tensors.expect(self._ahead[0].start)


Hidden = Tensor | HostInput
"""A group's input."""


def tokens_of(hidden: Hidden, chunk: Chunk) -> Tensor:
    """A chunk's hidden states, contiguous as a layer gets them without chunks: some call `.view`. One row on
    the device: no copy."""
    if isinstance(hidden, HostInput):
        return hidden.tokens_of(chunk)
    return hidden[:, chunk.start : chunk.end].contiguous()


def _version_of(x: Tensor) -> int:
    """How often `x` was changed in place; tensors of `torch.inference_mode` do not count that."""
    return 0 if x.is_inference() else x._version
