"""Keys and values of one layer, and their gradients: written in place, read as views, never concatenated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from chunkdist.stores.host_memory import HostMemory, HostTensor
from chunkdist.stream.stream import Chunk


class KVStore:
    """Buffers (B, T, K, D) of consecutive tokens of a stream, allocated at the first write.

    B rows, T tokens, K kv heads, D head dim. Positions that are passed count from the stream's first token.
    Gradients of K/V are summed over the chunks that read them, in `grad_dtype` unless K/V are wider.
    """

    def __init__(self, tokens: Chunk, grad_dtype: torch.dtype | None) -> None:
        self._tokens = tokens
        self._grad_dtype = grad_dtype
        self._kv: tuple[Tensor, Tensor] | None = None
        self._on_host: list[tuple[Chunk, HostTensor, HostTensor]] = []
        self._arriving: list[HostTensor] = []
        self._grads: tuple[Tensor, Tensor] | None = None
        self._unweighted: tuple[Tensor, Tensor] | None = None
        self._relays: dict[Chunk, list[tuple[Chunk, float]]] = {}
        self._keeps_unweighted = False

    def weigh_relays(
        self, chunks: Sequence[Chunk], weights: Sequence[Sequence[float]], *, keep_unweighted: bool
    ) -> None:
        """From now on, what chunk j leaves for an earlier chunk i is multiplied by `weights[j][i]` (SpaCO).

        Args:
            keep_unweighted: The sum without weights is kept too, for `left_out_of`.
        """
        self._relays = {
            reader: [(chunks[i], weight) for i, weight in enumerate(weights[j][:j]) if weight]
            + [(reader, 1.0)]
            for j, reader in enumerate(chunks)
            if weights[j][j]
        }
        self._keeps_unweighted = keep_unweighted

    def write(self, chunk: Chunk, k_BTKD: Tensor, v_BTKD: Tensor) -> None:
        """Stores the chunk's own keys and values."""
        if self._kv is None:
            self._kv = self._new_buffer(k_BTKD), self._new_buffer(v_BTKD)
        self._arrive()
        for buffer, x in zip(self._kv, (k_BTKD, v_BTKD), strict=True):
            self._part(buffer, chunk.start, chunk.end).copy_(x)

    def read(self, row: int, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Views (end - start, K, D) of one row's keys and values."""
        assert self._kv is not None, "read before the first write"
        self._arrive()
        k, v = self._kv
        return self._part(k, start, end)[row], self._part(v, start, end)[row]

    @property
    def bytes_per_token(self) -> int:
        """Bytes of keys and values of a token, of all rows; 0 before the first write."""
        return 0 if self._kv is None else sum(x[:, :1].nbytes for x in self._kv)

    def send(self, chunk: Chunk, host: HostMemory) -> None:
        """Begins to copy the chunk's keys and values to the host."""
        if self._kv is not None:
            k, v = (host.put(self._part(buffer, chunk.start, chunk.end)) for buffer in self._kv)
            self._on_host.append((chunk, k, v))

    def leave_device(self) -> None:
        """Once the copies of all chunks are done: lets go of keys and values, until `come_back`."""
        self._kv = None

    def come_back(self) -> None:
        """Begins to copy what was sent back; the first `read` or `write` waits for it."""
        if not self._on_host:
            return
        self._kv = tuple(  # type: ignore[assignment]
            torch.empty((x.shape[0], self._tokens.num_tokens, *x.shape[2:]), dtype=x.dtype, device=x.device)
            for x in self._on_host[0][1:]
        )
        assert self._kv is not None
        for chunk, *parts in self._on_host:
            for buffer, part in zip(self._kv, parts, strict=True):
                part.start(into=self._part(buffer, chunk.start, chunk.end))
                self._arriving.append(part)
        self._on_host = []

    @contextmanager
    def grads_from(self, reader: Chunk, row: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        """What one chunk's gradients of the keys and values from `start` to its own end, (S, K, D) each, are
        added to."""
        if self._grads is None:
            self._grads = self._new_grads()
        dk, dv = (self._part(grads, start, reader.end)[row] for grads in self._grads)
        if not self._relays:
            yield dk, dv
            return
        found = torch.zeros_like(dk), torch.zeros_like(dv)
        yield found
        for total, grads in zip((dk, dv), found, strict=True):
            for chunk, weight in self._relays[reader]:
                part = slice(max(chunk.start - start, 0), chunk.end - start)
                if chunk.end > start:
                    total[part].add_(grads[part], alpha=weight)
        if self._keeps_unweighted:
            self._unweighted = self._unweighted or self._new_grads()
            for total, grads in zip(self._unweighted, found, strict=True):
                self._part(total, start, reader.end)[row].add_(grads)

    def grads_of(self, chunk: Chunk) -> tuple[Tensor, Tensor] | None:
        """Views (B, T, K, D) of what has been left so far for the chunk's own keys and values; `None`:
        nothing yet."""
        if self._grads is None:
            return None
        dk, dv = (self._part(grads, chunk.start, chunk.end) for grads in self._grads)
        return dk, dv

    def left_out_of(self, chunk: Chunk) -> tuple[Tensor, ...]:
        """(B, T, K, D) each: what later chunks have left without weights, less what they have left with
        them."""
        if self._grads is None or self._unweighted is None:
            return ()
        return tuple(
            self._part(total, chunk.start, chunk.end) - self._part(weighted, chunk.start, chunk.end)
            for total, weighted in zip(self._unweighted, self._grads, strict=True)
        )

    def _arrive(self) -> None:
        for part in self._arriving:
            part.get()
        self._arriving = []

    def _part(self, buffer: Tensor, start: int, end: int) -> Tensor:
        return buffer[:, start - self._tokens.start : end - self._tokens.start]

    def _new_buffer(self, x_BTKD: Tensor) -> Tensor:
        num_rows, _, num_heads, head_dim = x_BTKD.shape
        return x_BTKD.new_empty((num_rows, self._tokens.num_tokens, num_heads, head_dim))

    def _new_grads(self) -> tuple[Tensor, Tensor]:
        assert self._kv is not None
        k, v = (torch.zeros_like(x, dtype=self._dtype_of_grads(x)) for x in self._kv)
        return k, v

    def _dtype_of_grads(self, x: Tensor) -> torch.dtype:
        return x.dtype if self._grad_dtype is None else torch.promote_types(x.dtype, self._grad_dtype)
