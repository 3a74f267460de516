"""Keys and values of one layer, and their gradients: written in place, read as views, never concatenated."""

from __future__ import annotations

import torch
from torch import Tensor

from chunkdist.schedule import Chunk


class KVStore:
    """Buffers (B, T, K, D) of consecutive tokens of a stream, allocated at the first write.

    B rows, T tokens, K kv heads, D head dim. Positions that are passed count from the stream's first token.
    Gradients of K/V are summed over the chunks that read them, in `grad_dtype` unless K/V are wider.
    """

    def __init__(self, tokens: Chunk, grad_dtype: torch.dtype | None) -> None:
        self._tokens = tokens
        self._grad_dtype = grad_dtype
        self._kv: tuple[Tensor, Tensor] | None = None
        self._grads: tuple[Tensor, Tensor] | None = None

    def write(self, chunk: Chunk, k_BTKD: Tensor, v_BTKD: Tensor) -> None:
        """Stores the chunk's own keys and values."""
        if self._kv is None:
            self._kv = self._new_buffer(k_BTKD), self._new_buffer(v_BTKD)
        for buffer, x in zip(self._kv, (k_BTKD, v_BTKD), strict=True):
            self._part(buffer, chunk.start, chunk.end).copy_(x)

    def read(self, row: int, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Views (end - start, K, D) of one row's keys and values."""
        assert self._kv is not None, "read before the first write"
        k, v = self._kv
        return self._part(k, start, end)[row], self._part(v, start, end)[row]

    def add_grads(self, row: int, start: int, dk_SKD: Tensor, dv_SKD: Tensor) -> None:
        """Adds what one chunk leaves for the keys and values from `start` on."""
        if self._grads is None:
            assert self._kv is not None
            k, v = self._kv
            self._grads = self._new_grads(k), self._new_grads(v)
        for grads, x in zip(self._grads, (dk_SKD, dv_SKD), strict=True):
            self._part(grads, start, start + x.shape[0])[row].add_(x)

    def grads_of(self, chunk: Chunk) -> tuple[Tensor, Tensor] | None:
        """Views (B, T, K, D) of what has been left so far for the chunk's own keys and values; `None`:
        nothing yet."""
        if self._grads is None:
            return None
        dk, dv = (self._part(grads, chunk.start, chunk.end) for grads in self._grads)
        return dk, dv

    def scale_grads(self, chunk: Chunk, factor: float) -> None:
        """Multiplies what later chunks have left for the chunk's keys and values."""
        for grads in self.grads_of(chunk) or ():
            grads *= factor

    def _part(self, buffer: Tensor, start: int, end: int) -> Tensor:
        return buffer[:, start - self._tokens.start : end - self._tokens.start]

    def _new_buffer(self, x_BTKD: Tensor) -> Tensor:
        num_rows, _, num_heads, head_dim = x_BTKD.shape
        return x_BTKD.new_empty((num_rows, self._tokens.num_tokens, num_heads, head_dim))

    def _new_grads(self, x: Tensor) -> Tensor:
        dtype = x.dtype if self._grad_dtype is None else torch.promote_types(x.dtype, self._grad_dtype)
        return torch.zeros_like(x, dtype=dtype)
