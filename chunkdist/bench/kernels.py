"""Attention implementations of transformers for the baselines, on the kernels that chunkdist has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface

from chunkdist.attention import AttentionChoice
from chunkdist.attention.base import AttentionRow, AttentionVariant, RowGradient, Span

WHOLE, SEGMENTS, PREFIX = "chunkdist_bench_whole", "chunkdist_bench_segments", "chunkdist_bench_prefix"
"""Causal on whole rows; on each segment that `position_ids` tell apart; and after a prefix."""
_CHOICE = AttentionChoice("auto")


class SpanKernel(torch.autograd.Function):
    """Causal attention of (1, N, T, D) over (1, K, S, D), within each span its last query aligned with its
    last key, by the fastest backend of chunkdist."""

    @staticmethod
    def forward(ctx: Any, scale: float, spans: tuple[Span, ...], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = [x[0].transpose(0, 1) for x in (q, k, v)]
        variant = AttentionVariant(scale=scale)
        backend = _CHOICE.backend_for(rows[0], variant)
        out_TND, lse_NT = backend.forward(AttentionRow(rows[0], rows[1], rows[2], spans, variant))
        ctx.save_for_backward(*rows, out_TND, lse_NT)
        ctx.backend, ctx.spans, ctx.variant = backend, spans, variant
        return out_TND[None]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q_TND, k_SKD, v_SKD, out_TND, lse_NT = ctx.saved_tensors
        wide = torch.promote_types(k_SKD.dtype, torch.float32)
        kv_grads = torch.zeros_like(k_SKD, dtype=wide), torch.zeros_like(v_SKD, dtype=wide)
        dq_TND = ctx.backend.backward(
            AttentionRow(q_TND, k_SKD, v_SKD, ctx.spans, ctx.variant),
            RowGradient(grad_out[0], out_TND, lse_NT, kv_grads),
        )
        dk, dv = (grad.to(k_SKD.dtype) for grad in kv_grads)
        return None, None, *(x.transpose(0, 1)[None] for x in (dq_TND, dk, dv))


def whole(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, **kwargs: Any
) -> tuple[Tensor, None]:
    """The kernel of `cpu_flash`, fake tensors too; on CUDA torch's own, and no other."""
    if query.is_cuda:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2), None
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out: Tensor = kernel(query, key, value, 0.0, True)[0]
    return out.transpose(1, 2), None


def segments(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Chunkdist's fastest backend where a row has several segments."""
    starts = (kwargs["position_ids"][0] == 0).nonzero().flatten().tolist()
    if len(starts) < 2:
        return whole(module, query, key, value, mask)
    ends = [*starts[1:], query.shape[2]]
    spans = tuple(Span(start, end, start, end) for start, end in zip(starts, ends, strict=True))
    return _on_spans(query, key, value, spans)


def prefix(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Chunkdist's fastest backend, on K and V as they come: the last query is aligned with the last key."""
    return _on_spans(query, key, value, (Span(0, query.shape[2], 0, key.shape[2]),))


def _on_spans(query: Tensor, key: Tensor, value: Tensor, spans: tuple[Span, ...]) -> tuple[Tensor, None]:
    scale = query.shape[-1] ** -0.5
    out: Tensor = SpanKernel.apply(scale, spans, query, key, value)  # type: ignore[no-untyped-call]
    return out, None


for _name, _function in ((WHOLE, whole), (SEGMENTS, segments), (PREFIX, prefix)):
    AttentionInterface.register(_name, _function)
    AttentionMaskInterface.register(_name, lambda **kwargs: None)
