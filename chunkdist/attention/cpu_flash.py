"""`cpu_flash`: torch's own flash attention for CPUs, without a mask."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from chunkdist.attention.base import AttentionRow, AttentionVariant, RowGradient
from chunkdist.attention.prefix_and_diagonal import backward_in_squares, forward_in_squares, heads_first

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

    def forward(self, row: AttentionRow) -> tuple[Tensor, Tensor]:
        return forward_in_squares(partial(_run_forward, scale=row.variant.scale), row)

    def backward(self, row: AttentionRow, given: RowGradient) -> Tensor:
        return backward_in_squares(partial(_run_backward, scale=row.variant.scale), row, given)


def _run_forward(
    q_TND: Tensor, k_SKD: Tensor, v_SKD: Tensor, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    out, lse = _forward(*map(heads_first, (q_TND, k_SKD, v_SKD)), 0.0, causal, scale=scale)
    return out[0].transpose(0, 1), lse[0]


def _run_backward(
    grad_out_TND: Tensor,
    q_TND: Tensor,
    k_SKD: Tensor,
    v_SKD: Tensor,
    out_TND: Tensor,
    lse_NT: Tensor,
    *,
    causal: bool,
    scale: float,
) -> tuple[list[Tensor], Tensor, Tensor]:
    num_cuts = 1 if causal else _even_cuts(q_TND.shape[1], k_SKD.shape[0])
    k_cKsD, v_cKsD = (x.unflatten(0, (num_cuts, -1)).transpose(1, 2) for x in (k_SKD, v_SKD))
    grad_out, q, out, lse = (
        x.expand(num_cuts, *x.shape[1:])
        for x in (*map(heads_first, (grad_out_TND, q_TND, out_TND)), lse_NT[None])
    )
    dq_cNTD, *dkv = _backward(grad_out, q, k_cKsD, v_cKsD, out, lse, 0.0, causal, scale=scale)
    dk_SKD, dv_SKD = (grad.transpose(1, 2).flatten(0, 1) for grad in dkv)
    return [dq_NTD.transpose(0, 1) for dq_NTD in dq_cNTD], dk_SKD, dv_SKD


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
