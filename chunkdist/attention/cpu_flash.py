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

MAX_CUTS, MIN_KEYS, MOSTLY_BUSY = 8, 256, 0.95

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
        kv_grads: tuple[Tensor, Tensor],
        spans: tuple[Span, ...],
        variant: AttentionVariant,
    ) -> Tensor:
        dq = torch.empty_like(q_TND)
        for span in spans:
            queries, prefix, own = _parts(span)
            row = [_heads_first(x[queries]) for x in (grad_out_TND, q_TND)]
            merged = _heads_first(out_TND[queries]), lse_NT[None, :, queries]
            for keys, causal in ((own, True), (prefix, False)):
                if keys is None:
                    continue
                num_cuts = 1 if causal else _even_cuts(q_TND.shape[1], keys.stop - keys.start)
                k_cKsD, v_cKsD = (
                    x[keys].unflatten(0, (num_cuts, -1)).transpose(1, 2) for x in (k_SKD, v_SKD)
                )
                grad_out, q, out, lse = (x.expand(num_cuts, *x.shape[1:]) for x in (*row, *merged))
                dq_cNTD, *dkv = _backward(
                    grad_out, q, k_cKsD, v_cKsD, out, lse, 0.0, causal, scale=variant.scale
                )
                for total, grad in zip(kv_grads, dkv, strict=True):
                    total[keys] += grad.transpose(1, 2).flatten(0, 1)
                if causal:
                    dq[queries] = dq_cNTD[0].transpose(0, 1)
                else:
                    for part_NTD in dq_cNTD:
                        dq[queries] += part_NTD.transpose(0, 1)
        return dq

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


def _even_cuts(num_heads: int, num_keys: int) -> int:
    """Into how many equal parts the keys are cut for the backward, whose threads share out heads, not keys.

    5 heads on 2 threads leave one of them idle for a sixth of the time; twice 5 heads do not.
    """
    num_threads = torch.get_num_threads()

    def busy(num_cuts: int) -> float:
        num_tasks = num_heads * num_cuts
        return num_tasks / (-(-num_tasks // num_threads) * num_threads)

    possible = [
        cuts for cuts in range(1, MAX_CUTS + 1) if num_keys % cuts == 0 and num_keys // cuts >= MIN_KEYS
    ]
    return max(possible or [1], key=lambda cuts: (busy(cuts) >= MOSTLY_BUSY or busy(cuts), -cuts))


def _parts(span: Span) -> tuple[slice, slice | None, slice]:
    """Queries, the keys before the first of them (None: there are none), and the keys on the diagonal."""
    diagonal = span.k_end - (span.q_end - span.q_start)
    prefix = slice(span.k_start, diagonal) if diagonal > span.k_start else None
    return slice(span.q_start, span.q_end), prefix, slice(diagonal, span.k_end)
