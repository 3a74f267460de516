"""Keys and values of one layer, and their gradients: written in place, read as views, never concatenated."""

from __future__ import annotations

import torch
from torch import Tensor

from chunkdist.schedule import Chunk


class KVStore:
    """Buffers (B, T, K, D) of all tokens, allocated at the first write.

    B rows, T tokens of the stream, K kv heads, D head dim. Gradients of K/V are summed over the chunks that
    read them, in `grad_dtype` unless K/V are wider.
    """

    def __init__(self, num_tokens: int, grad_dtype: torch.dtype | None) -> None:
        self._num_tokens = num_tokens
        self._grad_dtype = grad_dtype
        self._kv: tuple[Tensor, Tensor] | None = None
        self._grads: tuple[Tensor, Tensor] | None = None

    def write(self, chunk: Chunk, k_BTKD: Tensor, v_BTKD: Tensor) -> None:
        """Stores the chunk's own keys and values."""
        if self._kv is None:
            self._kv = self._new_buffer(k_BTKD), self._new_buffer(v_BTKD)
        for buffer, x in zip(self._kv, (k_BTKD, v_BTKD), strict=True):
            buffer[:, chunk.start : chunk.end] = x

    def read(self, row: int, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Views (end - start, K, D) of one row's keys and values."""
        assert self._kv is not None, "read before the first write"
        k, v = self._kv
        return k[row, start:end], v[row, start:end]

    def grads(self, row: int, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Views (end - start, K, D) of the gradients of one row's keys and values, to be added to."""
        if self._grads is None:
            assert self._kv is not None
            k, v = self._kv
            self._grads = self._new_grads(k), self._new_grads(v)
        dk, dv = self._grads
        return dk[row, start:end], dv[row, start:end]

    def grads_of(self, chunk: Chunk) -> tuple[Tensor, Tensor] | None:
        """Views (B, T, K, D) of what has been left so far for the chunk's own keys and values; `None`:
        nothing yet."""
        if self._grads is None:
            return None
        dk, dv = (grads[:, chunk.start : chunk.end] for grads in self._grads)
        return dk, dv

    def scale_grads(self, chunk: Chunk, factor: float) -> None:
        """Multiplies what later chunks have left for the chunk's keys and values."""
        for grads in self.grads_of(chunk) or ():
            grads *= factor

    def _new_buffer(self, x_BTKD: Tensor) -> Tensor:
        num_rows, _, num_heads, head_dim = x_BTKD.shape
        return x_BTKD.new_empty((num_rows, self._num_tokens, num_heads, head_dim))

    def _new_grads(self, x: Tensor) -> Tensor:
        dtype = x.dtype if self._grad_dtype is None else torch.promote_types(x.dtype, self._grad_dtype)
        return torch.zeros_like(x, dtype=dtype)
