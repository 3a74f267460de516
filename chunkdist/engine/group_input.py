"""The hidden states that a group of layers begins with, and cuts of them, on the device or from the host."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from chunkdist.errors import UnsupportedModelError
from chunkdist.stores.host_memory import HostMemory
from chunkdist.stores.state_relay import StateStore
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


class HostInput:
    """A group's input (B, T, H) on the host, by chunk: each comes back while the one before it is at work.

    Args:
        chunks: Those that are read in the backward.
        states: State stores of the group's layers; a chunk's states come with it.
    """

    def __init__(
        self, host: HostMemory, hidden: Tensor, chunks: Iterable[Chunk], states: Sequence[StateStore]
    ) -> None:
        self.shape, self.dtype, self.requires_grad = hidden.shape, hidden.dtype, hidden.requires_grad
        self._parts = {chunk: host.put(tokens_of(hidden, chunk)) for chunk in chunks}
        self._states = states
        self._order: list[Chunk] = []
        self._ahead: Chunk | None = None
        self._at_hand: tuple[Chunk, Tensor] | None = None

    def expect(self, order: Iterable[Chunk]) -> None:
        """In which order chunks will be read. Others can be read too, but are waited for."""
        self._order = [chunk for chunk in order if chunk in self._parts]

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
        if self._ahead is not None and self._ahead != chunk:
            self._parts[self._ahead].leave()
        if chunk in self._order:
            self._order = self._order[self._order.index(chunk) + 1 :]
        self._ahead = self._order[0] if self._order else None
        if self._ahead is not None:
            self._parts[self._ahead].start()
            for states in self._states:
                states.expect(self._ahead.start)


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
