"""Attention of a chunk over its prefix with kernels whose causal mask is for squares only.

A span is cut in two: the keys before the span's first query, seen by all its queries, and the square on the
diagonal. The parts are merged by their log-sum-exps; the backward of each part takes the merged output and
log-sum-exp, which makes the sum exact (arXiv 2205.14135, appendix B).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from chunkdist.attention.base import AttentionRow, RowGradient, Span


class ForwardKernel(Protocol):
    """(T, N, D), (S, K, D) twice: the output (T, N, D), and the log-sum-exp (N, T)."""

    def __call__(
        self, q_TND: Tensor, k_SKD: Tensor, v_SKD: Tensor, *, causal: bool
    ) -> tuple[Tensor, Tensor]: ...


class BackwardKernel(Protocol):
    """Parts of dq, (T, N, D), to be added up, and dk and dv, (S, K, D)."""

    def __call__(
        self,
        grad_out_TND: Tensor,
        q_TND: Tensor,
        k_SKD: Tensor,
        v_SKD: Tensor,
        out_TND: Tensor,
        lse_NT: Tensor,
        *,
        causal: bool,
    ) -> tuple[Sequence[Tensor], Tensor, Tensor]: ...


def forward_in_squares(kernel: ForwardKernel, row: AttentionRow) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of a row, as `Backend.forward` returns them."""
    return joined([_forward_span(kernel, row, span) for span in row.spans])


def backward_in_squares(kernel: BackwardKernel, row: AttentionRow, given: RowGradient) -> Tensor:
    """Gradients of a row, as `Backend.backward` returns them."""
    q_TND, k_SKD, v_SKD = row.qkv
    dq_TND = torch.zeros_like(q_TND)
    for span in row.spans:
        queries, parts = _parts(row, span)
        merged = given.out_TND[queries], given.lse_NT[:, queries]
        for keys, causal in parts:
            dqs, *dkv = kernel(
                given.grad_out_TND[queries], q_TND[queries], k_SKD[keys], v_SKD[keys], *merged, causal=causal
            )
            for total, grad in zip(given.kv_grads, dkv, strict=True):
                total[keys] += grad
            for dq in dqs:
                dq_TND[queries] += dq
    return dq_TND


def joined(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Outputs (T, N, D) and log-sum-exps (N, T) of neighbouring queries, as one."""
    if len(parts) == 1:
        return parts[0]
    outs, lses = zip(*parts, strict=True)
    return torch.cat(outs), torch.cat(lses, dim=1)


def heads_first(x_TND: Tensor) -> Tensor:
    """(T, N, D) to (1, N, T, D), a view."""
    return x_TND.transpose(0, 1)[None]


def merged(
    out_TND: Tensor, lse_NT: Tensor, other_out_TND: Tensor, other_lse_NT: Tensor
) -> tuple[Tensor, Tensor]:
    """Output, in the dtype of the log-sum-exp, and log-sum-exp of the same queries over two sets of keys."""
    share = torch.sigmoid(other_lse_NT - lse_NT).T[..., None]
    out = torch.lerp(out_TND.to(share.dtype), other_out_TND.to(share.dtype), share)
    return out, torch.logaddexp(lse_NT, other_lse_NT)


def _forward_span(kernel: ForwardKernel, row: AttentionRow, span: Span) -> tuple[Tensor, Tensor]:
    q_TND, k_SKD, v_SKD = row.qkv
    queries, parts = _parts(row, span)
    found = [kernel(q_TND[queries], k_SKD[keys], v_SKD[keys], causal=causal) for keys, causal in parts]
    if len(found) == 1:
        return found[0]
    out, lse = merged(*found[0], *found[1])
    return out.to(q_TND.dtype), lse


def _parts(row: AttentionRow, span: Span) -> tuple[slice, list[tuple[slice, bool]]]:
    """Queries, and their keys: those on the diagonal, with True, and those that all queries see."""
    diagonal = min(row.first_query_at(span), span.k_end)
    parts = [(slice(diagonal, span.k_end), True), (slice(span.k_start, diagonal), False)]
    return slice(span.q_start, span.q_end), [
        (keys, causal) for keys, causal in parts if keys.start < keys.stop
    ]
