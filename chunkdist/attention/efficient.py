"""`efficient`: torch's memory-efficient attention for CUDA (xFormers' kernels), by its aten operators. It
takes fp32, and cards older than Ampere.

Read in pytorch's sources (aten/src/ATen/native/transformers/cuda/attention.cu and attention_backward.cu,
mem_eff_attention/kernel_forward.h and kernel_backward.h) and in native_functions.yaml of torch 2.13.0:
- Tensors are (B, tokens, heads, D), of any strides but that of D, which is 1; as many kv as query heads.
  Here, the query heads that share a kv head are a batch, in which K and V have stride 0: nothing is copied.
- Mask type 2 is causal, the last query aligned with the last key; 0 is none.
- The log-sum-exp is (B, heads, tokens), fp32, natural, padded with +inf to a multiple of 32 tokens, and the
  backward wants it so. It takes the output that it is given, for the row's dot product.
- fp32 products are of three TF32 ones each on compute capability 8.0 and later, exact to fp32's rounding.
- Without dropout neither seed nor offset is read.

None of this is promised, so the first use on a device is checked against `math`.
"""

from __future__ import annotations

from functools import cache
from typing import cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from chunkdist.attention.base import AttentionRow, AttentionVariant, RowGradient
from chunkdist.attention.first_use import what_is_wrong
from chunkdist.attention.prefix_and_diagonal import joined
from chunkdist.attention.varlen import in_head_parts, must_be_deterministic, why_no_nvidia_gpu

_ALL, _CAUSAL_FROM_BOTTOM_RIGHT = 0, 2
_LSE_MULTIPLE = 32
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class EfficientBackend:
    name = "efficient"
    equal_head_dims = True

    def why_not(self, q: Tensor, variant: AttentionVariant) -> str | None:
        if q.dtype not in _DTYPES:
            return f"it takes float32, float16 and bfloat16, the tensors are {str(q.dtype)[6:]}"
        if variant.softcap is not None:
            return "it has no soft-cap"
        if variant.window is not None:
            return "it is run without a sliding window here"
        if q.shape[-1] % 8:
            return f"it takes head dims that 8 divides here, this one is {q.shape[-1]}"
        if isinstance(q, FakeTensor):
            return None
        if (why_not := why_no_nvidia_gpu(q)) is not None:
            return why_not
        if must_be_deterministic():
            return "its backward is not deterministic"
        if q.dtype == torch.bfloat16 and torch.cuda.get_device_capability(q.device) < (8, 0):
            return "bfloat16 needs compute capability 8.0"
        return why_wrong(q.device, q.dtype, q.shape[-1])

    def forward(self, row: AttentionRow) -> tuple[Tensor, Tensor]:
        q_TND, k_SKD, v_SKD = row.qkv
        parts = []
        for span in row.spans:
            queries, keys = slice(span.q_start, span.q_end), slice(span.k_start, span.k_end)
            out_GTKD, lse_GKT, *_ = torch.ops.aten._efficient_attention_forward(
                *_batched(q_TND[queries], k_SKD[keys], v_SKD[keys]),
                *(None, None, None, None, None),
                0.0,
                _mask(row),
                True,
                scale=row.variant.scale,
            )
            lse_GKT = lse_GKT[..., : span.q_end - span.q_start]
            parts.append((_by_head(out_GTKD), lse_GKT.transpose(0, 1).flatten(0, 1)))
        return joined(parts)

    def backward(self, row: AttentionRow, given: RowGradient) -> Tensor:
        return in_head_parts(_backward, row, given)


def _backward(row: AttentionRow, given: RowGradient) -> Tensor:
    q_TND, k_SKD, v_SKD = row.qkv
    num_kv_heads = k_SKD.shape[1]
    unread = torch.empty((), dtype=torch.int64, device=q_TND.device)
    dqs = []
    for span in row.spans:
        queries, keys = slice(span.q_start, span.q_end), slice(span.k_start, span.k_end)
        num_queries, num_keys = span.q_end - span.q_start, span.k_end - span.k_start
        lse_GKT = given.lse_NT[:, queries].unflatten(0, (num_kv_heads, -1)).transpose(0, 1)
        tensors = _batched(q_TND[queries], k_SKD[keys], v_SKD[keys])
        grad_out_GTKD = _by_group(given.grad_out_TND[queries], num_kv_heads)
        out_GTKD = _by_group(given.out_TND[queries], num_kv_heads)
        lse_padded = F.pad(lse_GKT, (0, -num_queries % _LSE_MULTIPLE), value=torch.inf).contiguous()
        if isinstance(q_TND, FakeTensor):  # torch 2.13's fake version lacks an argument
            dq_GTKD, dk_GSKD, dv_GSKD = (x.new_empty(x.shape) for x in tensors)
        else:
            dq_GTKD, dk_GSKD, dv_GSKD, _ = torch.ops.aten._efficient_attention_backward(
                *(grad_out_GTKD, *tensors, None, out_GTKD),
                *(None, None, num_queries, num_keys, lse_padded, 0.0, unread, unread),
                *(_mask(row), False),
                scale=row.variant.scale,
            )
        for total, grad in zip(given.kv_grads, (dk_GSKD, dv_GSKD), strict=True):
            total[keys] += grad[0] if grad.shape[0] == 1 else grad.sum(0)
        dqs.append(_by_head(dq_GTKD))
    return dqs[0] if len(dqs) == 1 else torch.cat(dqs)


@cache
def why_wrong(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """The first use, with and without shared kv heads."""
    return what_is_wrong(((EfficientBackend(), 2), (EfficientBackend(), 4)), device, dtype, head_dim)


def _mask(row: AttentionRow) -> int:
    """Keys of an earlier part are seen by all queries."""
    return _CAUSAL_FROM_BOTTOM_RIGHT if row.gap is None else _ALL


def _batched(q_TND: Tensor, k_SKD: Tensor, v_SKD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (G, T, K, D), keys and values (G, S, K, D) as views, G query heads a kv head."""
    q_GTKD = _by_group(q_TND, k_SKD.shape[1])
    k_GSKD, v_GSKD = (x.expand(q_GTKD.shape[0], *x.shape) for x in (k_SKD, v_SKD))
    return q_GTKD, k_GSKD, v_GSKD


def _by_group(x_TND: Tensor, num_kv_heads: int) -> Tensor:
    """(T, N, D) to (G, T, K, D), a view."""
    x_TKGD = cast(Tensor, x_TND.unflatten(1, (num_kv_heads, -1)))
    return x_TKGD.permute(2, 0, 1, 3)


def _by_head(x_GTKD: Tensor) -> Tensor:
    """(G, T, K, D) to (T, N, D)."""
    return x_GTKD.permute(1, 2, 0, 3).flatten(1, 2)
