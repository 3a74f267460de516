"""A stand-in for cuDNN's attention behind torch's operators.

Written from pytorch's sources (native/cudnn/MHA.cpp, native/transformers/cuda/attention.cu), without any code
of chunkdist's. Where the real one would read or write wild, it raises.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class CudnnKernel:
    """Dense attention in the dtype of sums."""

    dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16)  # fp64 too, to compare to rounding
    keys_seen: list[Tensor] = field(default_factory=list)
    backward_plans: dict[Any, Any] = field(default_factory=dict)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        """The output (B, N, T, D), laid out as q, and the log-sum-exp (B, N, T, 1)."""
        self._check(q, k, v)
        scores = self._scores(q, k, causal=causal, scale=scale)
        lse = scores.logsumexp(-1, keepdim=True)
        out = torch.empty_like(q)
        out.copy_(torch.exp(scores - lse) @ _per_head(v, q))
        return out, lse

    def backward(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        *,
        causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        self._check(q, k, v)
        assert lse.shape == (*q.shape[:3], 1)
        assert lse.is_contiguous()
        assert lse.dtype == _sum_dtype(q)
        key = (*(x.shape for x in (q, k, v)), *(x.stride() for x in (q, k, v)), q.dtype, causal)
        layouts = out.stride(), grad_out.stride()
        assert self.backward_plans.setdefault(key, layouts) == layouts, "the plan found was for other layouts"
        wide = _sum_dtype(q)
        weights = torch.exp(self._scores(q, k, causal=causal, scale=scale) - lse)
        row_dot = (grad_out.to(wide) * out.to(wide)).sum(-1, keepdim=True)
        dscores = weights * (grad_out.to(wide) @ _per_head(v, q).transpose(2, 3) - row_dot) * scale
        dk, dv = (
            x.transpose(2, 3) @ y.to(wide) for x, y in ((dscores, q), (weights, grad_out))
        )  # of a query head each
        of_kv_head = (k.shape[0], k.shape[1], -1, *k.shape[2:])
        return (
            torch.empty_like(q).copy_(dscores @ _per_head(k, q)),
            torch.empty_like(k).copy_(dk.view(of_kv_head).sum(2)),
            torch.empty_like(v).copy_(dv.view(of_kv_head).sum(2)),
        )

    def _scores(self, q: Tensor, k: Tensor, *, causal: bool, scale: float) -> Tensor:
        scores = q.to(_sum_dtype(q)) @ _per_head(k, q).transpose(2, 3) * scale
        if not causal:
            return scores
        row, column = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
        return scores.masked_fill(column > row, -torch.inf)  # CausalMask::TOP_LEFT

    def _check(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        self.keys_seen.append(k)
        if q.dtype not in self.dtypes:
            raise RuntimeError("Expected query, key and value to all be of dtype: {Half, BFloat16}")
        assert q.dim() == k.dim() == v.dim() == 4
        assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
        assert q.shape[1] % k.shape[1] == 0
        assert q.shape[2] > 0
        assert k.shape[2] > 0


class BinaryKernel(CudnnKernel):
    """A wrong one: the log-sum-exp is to the base 2."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        out, lse = super().forward(q, k, v, causal=causal, scale=scale)
        return out, lse * torch.tensor(2.0).log().reciprocal()


class DeafKernel(CudnnKernel):
    """A wrong one: the backward computes output and log-sum-exp again instead of taking the given ones."""

    def backward(
        self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *given: Tensor, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        own = self.forward(q, k, v, causal=causal, scale=scale)
        return super().backward(grad_out, q, k, v, *own, causal=causal, scale=scale)


class BottomRightKernel(CudnnKernel):
    """A wrong one, but for squares: the last query stands at the last key."""

    def _scores(self, q: Tensor, k: Tensor, *, causal: bool, scale: float) -> Tensor:
        scores = super()._scores(q, k, causal=False, scale=scale)
        hidden = torch.ones(scores.shape[2:], dtype=torch.bool).tril(k.shape[2] - q.shape[2]).logical_not()
        return scores.masked_fill(hidden, -torch.inf) if causal else scores


class FirstHeadKernel(CudnnKernel):
    """A wrong one: kv heads that several query heads share get the gradient of the first of these."""

    def backward(self, *tensors: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        grad_out, q, k, *_ = tensors
        first = torch.zeros(q.shape[1])
        first[:: q.shape[1] // k.shape[1]] = 1
        dq, *_ = super().backward(*tensors, causal=causal, scale=scale)
        grad_out = (grad_out * first[:, None, None]).to(q.dtype)
        _, dk, dv = super().backward(grad_out, *tensors[1:], causal=causal, scale=scale)
        return dq, dk, dv


class DenseKernel(CudnnKernel):
    """A wrong one: the gradients of keys whose heads do not lie one after another are lost."""

    def backward(self, *tensors: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        k = tensors[2]
        dq, dk, dv = super().backward(*tensors, causal=causal, scale=scale)
        is_dense = k.transpose(1, 2).is_contiguous()
        return dq, dk * is_dense, dv * is_dense


class AbsentKernel(CudnnKernel):
    """Takes nothing, as where cuDNN has no plan."""

    def _check(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        raise RuntimeError("cuDNN Frontend error: No valid execution plans built.\nmore of it")


# fmt: off
def aten_forward(kernel: CudnnKernel) -> Any:
    """`aten::_scaled_dot_product_cudnn_attention` of torch 2.9 to 2.13."""

    def _scaled_dot_product_cudnn_attention(
        query: Tensor, key: Tensor, value: Tensor, attn_bias: Tensor | None, compute_log_sumexp: bool,
        dropout_p: float = 0.0, is_causal: bool = False, return_debug_mask: bool = False, *,
        scale: float | None = None,
    ) -> tuple[Any, ...]:
        assert (attn_bias, compute_log_sumexp, dropout_p, return_debug_mask) == (None, True, 0.0, False)
        assert scale is not None
        out, lse = kernel.forward(query, key, value, causal=is_causal, scale=scale)
        unset = query.new_empty(0)
        return out, lse, unset, unset, query.shape[2], key.shape[2], unset, unset, unset

    return _scaled_dot_product_cudnn_attention


def aten_backward(kernel: CudnnKernel) -> Any:
    """`aten::_scaled_dot_product_cudnn_attention_backward` of torch 2.9 to 2.13."""

    def _scaled_dot_product_cudnn_attention_backward(
        grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor,
        philox_seed: Tensor, philox_offset: Tensor, attn_bias: Tensor | None, cum_seq_q: Tensor | None,
        cum_seq_k: Tensor | None, max_q: int, max_k: int, dropout_p: float, is_causal: bool, *,
        scale: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert (attn_bias, cum_seq_q, cum_seq_k, dropout_p) == (None, None, None, 0.0)
        assert (max_q, max_k) == (query.shape[2], key.shape[2])
        assert philox_seed.dtype == philox_offset.dtype == torch.int64
        assert scale is not None
        return kernel.backward(
            grad_out, query, key, value, out, logsumexp, causal=is_causal, scale=scale
        )

    return _scaled_dot_product_cudnn_attention_backward


def aten_in_place(kernel: CudnnKernel) -> Any:
    """The stand-in as torch's CPU kernel of the two operators. The library's `_destroy()` takes it away."""
    library: Any = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    library.impl("_scaled_dot_product_cudnn_attention", aten_forward(kernel), "CPU")
    library.impl("_scaled_dot_product_cudnn_attention_backward", aten_backward(kernel), "CPU")
    return library
# fmt: on


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _per_head(x_BKSD: Tensor, q: Tensor) -> Tensor:
    """(B, K, S, D) to (B, N, S, D), wide: kv head n // (N / K) serves query head n."""
    return x_BKSD.to(_sum_dtype(q)).repeat_interleave(q.shape[1] // x_BKSD.shape[1], dim=1)
