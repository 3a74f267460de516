"""The hidden states that a group of layers begins with, and cuts of them."""

from __future__ import annotations

from torch import Tensor

from chunkdist.errors import UnsupportedModelError
from chunkdist.schedule import Chunk


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


def tokens_of(hidden: Tensor, chunk: Chunk) -> Tensor:
    """A chunk's hidden states, contiguous as a layer gets them without chunks: some call `.view`. One row: no
    copy."""
    return hidden[:, chunk.start : chunk.end].contiguous()


def _version_of(x: Tensor) -> int:
    """How often `x` was changed in place; tensors of `torch.inference_mode` do not count that."""
    return 0 if x.is_inference() else x._version
