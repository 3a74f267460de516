"""`cpu_flash`: torch's own flash attention for CPUs, without a mask.

The kernel has causal masks for squares only, so a span is cut in two: the keys before the span's first query,
seen by all its queries, and the square on the diagonal. The parts are merged by their log-sum-exps; the
backward of each part takes the merged output and log-sum-exp, which makes the sum exact (arXiv 2205.14135,
appendix B).
"""

from __future__ import annotations

import torch
from torch import Tensor

from chunkdist.attention.base import AttentionVariant, Span

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class CpuFlashBackend:
    name = "cpu_flash"
    equal_head_dims = True

    def why_not(self, q: Tensor, variant: AttentionVariant) -> str | None:
        if q.device.type != "cpu":
            return f"it runs on a CPU, the tensors are on {q.device.type}"
        if variant.window is not None:
            return "it has no sliding window"
        if variant.softcap is not None:
            return "it has no soft-cap"
        return None

    def forward(
        self, q_TND: Tensor, k_SKD: Tensor, v_SKD: Tensor, spans: tuple[Span, ...], variant: AttentionVariant
    ) -> tuple[Tensor, Tensor]:
        parts = [self._forward_span(q_TND, k_SKD, v_SKD, span, variant) for span in spans]
        if len(parts) == 1:
            return parts[0]
        outs, lses = zip(*parts, strict=True)
        return torch.cat(outs), torch.cat(lses, dim=1)

    def backward(
        self,
        grad_out_TND: Tensor,
        q_TND: Tensor,
        k_SKD: Tensor,
        v_SKD: Tensor,
        out_TND: Tensor,
        lse_NT: Tensor,
        spans: tuple[Span, ...],
        variant: AttentionVariant,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = torch.empty_like(q_TND), torch.empty_like(k_SKD), torch.empty_like(v_SKD)
        dk[: spans[0].k_start] = dv[: spans[0].k_start] = 0
        for span in spans:
            queries, prefix, own = _parts(span)
            row = [_heads_first(x[queries]) for x in (grad_out_TND, q_TND)]
            merged = _heads_first(out_TND[queries]), lse_NT[None, :, queries]
            for keys, causal in ((own, True), (prefix, False)):
                if keys is None:
                    continue
                grads = _backward(
                    *row,
                    _heads_first(k_SKD[keys]),
                    _heads_first(v_SKD[keys]),
                    *merged,
                    0.0,
                    causal,
                    scale=variant.scale,
                )
                part_dq, dk[keys], dv[keys] = (grad[0].transpose(0, 1) for grad in grads)
                if causal:
                    dq[queries] = part_dq
                else:
                    dq[queries] += part_dq
        return dq, dk, dv

    def _forward_span(
        self, q_TND: Tensor, k_SKD: Tensor, v_SKD: Tensor, span: Span, variant: AttentionVariant
    ) -> tuple[Tensor, Tensor]:
        queries, prefix, own = _parts(span)
        out, lse = self._run(q_TND[queries], k_SKD[own], v_SKD[own], causal=True, variant=variant)
        if prefix is None:
            return out, lse
        other_out, other_lse = self._run(
            q_TND[queries], k_SKD[prefix], v_SKD[prefix], causal=False, variant=variant
        )
        share = torch.sigmoid(other_lse - lse).T[..., None]
        merged = torch.lerp(out.to(share.dtype), other_out.to(share.dtype), share)
        return merged.to(out.dtype), torch.logaddexp(lse, other_lse)

    def _run(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, variant: AttentionVariant
    ) -> tuple[Tensor, Tensor]:
        out, lse = _forward(
            _heads_first(q), _heads_first(k), _heads_first(v), 0.0, causal, scale=variant.scale
        )
        return out[0].transpose(0, 1), lse[0]


def _heads_first(x_TND: Tensor) -> Tensor:
    """(T, N, D) to (1, N, T, D), a view."""
    return x_TND.transpose(0, 1)[None]


def _parts(span: Span) -> tuple[slice, slice | None, slice]:
    """Queries, the keys before the first of them (None: there are none), and the keys on the diagonal."""
    diagonal = span.k_end - (span.q_end - span.q_start)
    prefix = slice(span.k_start, diagonal) if diagonal > span.k_start else None
    return slice(span.q_start, span.q_end), prefix, slice(diagonal, span.k_end)
