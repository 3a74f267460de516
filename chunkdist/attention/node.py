"""The autograd node of a running cell's attention.

B rows, T tokens of the chunk, S of the keys it sees, N query heads, K kv heads, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from chunkdist.attention.base import AttentionVariant, Backend
from chunkdist.attention.cell import Cell
from chunkdist.attention.parts import backward_parts, forward_parts
from chunkdist.attention.visible import visible
from chunkdist.replay import without_autocast
from chunkdist.stores.kv_store import KVStore

Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None]
"""Queries (B, T, N, D), keys and values (B, T, K, D), and attention sinks (N,)."""


def chunk_attention(
    cell: Cell, backend: Backend, variant: AttentionVariant, block: int | None, inputs: Inputs
) -> Tensor:
    """Stores the chunk's K/V and attends to the prefix: (B, T, N, D), contiguous.

    The backward leaves the prefix's gradients in the store, and takes there what later chunks left for this
    chunk.
    """
    out_BTND: Tensor = _ChunkAttention.apply(cell, backend, variant, block, *inputs)  # type: ignore[no-untyped-call]
    if cell.outputs is not None and cell.outputs.are_kept(variant.window):
        cell.outputs.lend(out_BTND)
    return out_BTND


class _ChunkAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        cell: Cell,
        backend: Backend,
        variant: AttentionVariant,
        block: int | None,
        q_BTND: Tensor,
        k_BTKD: Tensor,
        v_BTKD: Tensor,
        sink_N: Tensor | None,
    ) -> Tensor:
        store, outputs = cell.store, cell.outputs
        if outputs is not None and not outputs.are_kept(variant.window):
            outputs = None
        assert store is not None
        store.write(cell.tokens, k_BTKD, v_BTKD)
        kept = None if outputs is None else outputs.read(cell.chunk)
        out_BTND, lse_BNT = kept or _attend(cell, store, backend, variant, block, q_BTND, sink_N)
        if outputs is not None and kept is None:
            outputs.write(cell.chunk, out_BTND, lse_BNT)
        ctx.save_for_backward(q_BTND, out_BTND, lse_BNT, sink_N)
        ctx.cell, ctx.store, ctx.backend, ctx.variant, ctx.block = cell, store, backend, variant, block
        return out_BTND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out_BTND: Tensor) -> tuple[Tensor | None, ...]:
        q_BTND, out_BTND, lse_BNT, sink_N = ctx.saved_tensors
        cell: Cell = ctx.cell
        store: KVStore = ctx.store
        dqs = []
        with without_autocast(q_BTND.device.type):
            for row, q_TND in enumerate(q_BTND):
                dq_TND = backward_parts(
                    ctx.backend,
                    q_TND,
                    store,
                    row,
                    visible(cell.whole, cell.tokens, row, ctx.variant.window, ctx.block),
                    ctx.variant,
                    reader=cell.tokens,
                    merged=(grad_out_BTND[row], out_BTND[row], lse_BNT[row]),
                )
                dqs.append(dq_TND)
        own_grads = store.grads_of(cell.tokens)
        assert own_grads is not None
        dk_BTKD, dv_BTKD = (grad.to(q_BTND.dtype) for grad in own_grads)
        dsink_N = None
        if sink_N is not None and ctx.needs_input_grad[7]:
            out_dot_BNT = (grad_out_BTND.to(lse_BNT.dtype) * out_BTND).sum(-1).transpose(1, 2)
            share_BNT = torch.exp(sink_N.to(lse_BNT.dtype)[:, None] - lse_BNT)
            dsink_N = -(share_BNT * out_dot_BNT).sum((0, 2)).to(sink_N.dtype)
        return None, None, None, None, _stack(dqs), dk_BTKD, dv_BTKD, dsink_N


def _attend(
    cell: Cell,
    store: KVStore,
    backend: Backend,
    variant: AttentionVariant,
    block: int | None,
    q_BTND: Tensor,
    sink_N: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The output (B, T, N, D), contiguous, and the log-sum-exp (B, N, T) with the sinks in it."""
    outs, lses = [], []
    with without_autocast(q_BTND.device.type):
        for row, q_TND in enumerate(q_BTND):
            parts = visible(cell.whole, cell.tokens, row, variant.window, block)
            out_TND, lse_NT = forward_parts(backend, q_TND, store, row, parts, variant)
            if sink_N is not None:
                lse_with_sink = torch.logaddexp(lse_NT, sink_N.to(lse_NT.dtype)[:, None])
                out_TND = (out_TND * torch.exp(lse_NT - lse_with_sink).T[..., None]).to(out_TND.dtype)
                lse_NT = lse_with_sink
            outs.append(out_TND)
            lses.append(lse_NT)
    # Contiguous, as what comes back from the host is: kernels add up in an order that follows strides.
    return _stack(outs).contiguous(), _stack(lses).contiguous()


def _stack(rows: list[Tensor]) -> Tensor:
    return rows[0][None] if len(rows) == 1 else torch.stack(rows)
