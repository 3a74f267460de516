"""Stand-ins for the CUDA kernels of torch and flash-attn.

`FlashKernel` is written from the kernels' sources (flash-attn 2.8.3, csrc/flash_attn: mha_varlen_fwd and
mha_varlen_bwd in flash_api.cpp for arguments, checks and layouts; src/mask.h for who sees whom; src/softmax.h
for the log-sum-exp; src/flash_bwd_kernel.h for the gradients; torch's copy is the same without the soft-cap),
and shares no code with chunkdist. Where the real kernel would read or write wild, it raises or leaves nan.
`aten_in_place` and `flash_attn_in_place` dress it in the signatures of the two libraries and put it where
they are.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor


@dataclass(frozen=True)
class Arguments:
    """What the kernels take beside the tensors."""

    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int
    scale: float
    causal: bool
    left: int
    right: int
    softcap: float = 0.0

    def sequences(self) -> Iterator[tuple[slice, slice]]:
        q_ends, k_ends = self.cu_q.tolist(), self.cu_k.tolist()
        for b in range(len(q_ends) - 1):
            yield slice(q_ends[b], q_ends[b + 1]), slice(k_ends[b], k_ends[b + 1])

    def window(self) -> tuple[int, int]:
        """flash_api.cpp: causal is right 0, but for single queries; a window as long as the keys is none."""
        right = 0 if self.causal and self.max_q > 1 else self.right
        return -1 if self.left >= self.max_k else self.left, -1 if right >= self.max_k else right


@dataclass
class FlashKernel:
    """The kernels of flash-attn 2 for sequences of different lengths."""

    dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16)  # fp64 too, to compare to rounding
    keys_seen: list[Tensor] = field(default_factory=list)  # the K of every call
    deterministic: bool | None = None  # of the last backward

    def visible(self, num_queries: int, num_keys: int, left: int, right: int) -> Tensor:
        """(queries, keys). mask.h, apply_mask_local: row i ends before i + 1 + keys - queries + right, and
        starts at i + keys - queries - left; a negative size is no limit."""
        row = torch.arange(num_queries)[:, None] + num_keys - num_queries
        column = torch.arange(num_keys)
        ends = column < row + 1 + right if right >= 0 else torch.tensor(True)
        starts = column >= row - left if left >= 0 else torch.tensor(True)
        return (ends & starts).expand(num_queries, num_keys)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, arguments: Arguments) -> tuple[Tensor, Tensor]:
        self._check(arguments, q=q, k=k, v=v)
        self.keys_seen.append(k)
        out = torch.full_like(q, torch.nan)
        lse = torch.full((q.shape[1], q.shape[0]), torch.nan, dtype=_sum_dtype(q))
        for queries, keys in arguments.sequences():
            scores, _ = self._scores(q[queries], k[keys], arguments)
            total = scores.logsumexp(-1)
            weights = torch.exp(scores - total.masked_fill(total == -torch.inf, 0)[..., None])
            out[queries] = (weights @ _per_head(v[keys], q)).transpose(0, 1).to(q.dtype)
            lse[:, queries] = total.masked_fill(total == -torch.inf, torch.inf)  # softmax.h: no key, inf
        return out, lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, arguments: Arguments
    ) -> tuple[Tensor, Tensor, Tensor]:
        self._check(arguments, q=q, k=k, v=v, out=out, dout=dout)
        _require(out.shape == dout.shape == q.shape, "out and dout must have the shape of q")
        # Not checked by the kernel, which would read other numbers:
        assert lse.shape == (q.shape[1], q.shape[0])
        assert lse.is_contiguous()
        assert lse.dtype == _sum_dtype(q)
        self.keys_seen.append(k)
        dq = torch.full_like(q, torch.nan)
        dk, dv = (
            k.new_full((k.shape[0], q.shape[1], k.shape[2]), torch.nan) for _ in range(2)
        )  # a query head
        row_dot = (dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1).T
        for queries, keys in arguments.sequences():
            scores, slope = self._scores(q[queries], k[keys], arguments)
            weights = torch.exp(scores - lse[:, queries, None])
            grad = dout[queries].to(lse.dtype).transpose(0, 1)
            dweights = grad @ _per_head(v[keys], q).transpose(1, 2)
            dscores = weights * (dweights - row_dot[:, queries, None]) * slope * arguments.scale
            dq[queries] = (dscores @ _per_head(k[keys], q)).transpose(0, 1).to(q.dtype)
            dk_heads = dscores.transpose(1, 2) @ q[queries].to(lse.dtype).transpose(0, 1)
            dk[keys] = dk_heads.transpose(0, 1).to(q.dtype)
            dv[keys] = (weights.transpose(1, 2) @ grad).transpose(0, 1).to(q.dtype)
        by_kv_head = (k.shape[0], k.shape[1], -1, k.shape[2])
        return dq, dk.view(by_kv_head).sum(2), dv.view(by_kv_head).sum(2)

    def _scores(self, q: Tensor, k: Tensor, arguments: Arguments) -> tuple[Tensor, Tensor]:
        """(N, queries, keys), and the slope of the soft-cap."""
        scores = q.to(_sum_dtype(q)).transpose(0, 1) @ _per_head(k, q).transpose(1, 2) * arguments.scale
        slope = torch.ones_like(scores)
        if arguments.softcap > 0:
            slope = 1 - torch.tanh(scores / arguments.softcap) ** 2
            scores = torch.tanh(scores / arguments.softcap) * arguments.softcap
        hidden = ~self.visible(q.shape[0], k.shape[0], *arguments.window())
        return scores.masked_fill(hidden, -torch.inf), slope

    def _check(self, arguments: Arguments, **tensors: Tensor) -> None:
        q, k, v = (tensors[name] for name in "qkv")
        _require(q.dtype in self.dtypes, "FlashAttention only support fp16 and bf16 data type")
        for name, tensor in tensors.items():
            _require(tensor.dtype == q.dtype, f"query and {name} must have the same dtype")
            _require(tensor.dim() == 3, f"{name} must have three dimensions")
            _require(tensor.stride(-1) == 1, "Input tensor must have contiguous last dimension")
        num_heads, head_dim = q.shape[1:]
        _require(head_dim <= 256, "FlashAttention forward only supports head dimension at most 256")
        _require(head_dim % 8 == 0, "head_size must be a multiple of 8")
        _require(num_heads % k.shape[1] == 0, "Number of heads in key/value must divide those in query")
        _require(k.shape == v.shape and k.shape[2] == head_dim, "k and v must have the same head_size as q")
        cu_q, cu_k = arguments.cu_q, arguments.cu_k
        for ends in (cu_q, cu_k):
            _require(ends.dtype == torch.int32, "cu_seqlens must have dtype int32")
            _require(ends.is_contiguous(), "cu_seqlens must be contiguous")
            _require(
                ends.shape == cu_q.shape and ends.dim() == 1, "cu_seqlens must have shape (batch_size + 1)"
            )
        # Not checked by the kernel, which would go astray:
        assert cu_q[-1] == q.shape[0]
        assert cu_k[-1] <= k.shape[0]
        assert arguments.max_q >= cu_q.diff().max()
        assert arguments.max_k >= cu_k.diff().max()


class TopLeftKernel(FlashKernel):
    """A wrong one: query i stands at key i, as in flash-attn before 2.1."""

    def visible(self, num_queries: int, num_keys: int, left: int, right: int) -> Tensor:
        return super().visible(num_keys, num_keys, left, right)[:num_queries]


class WideWindowKernel(FlashKernel):
    """A wrong one: a window of one token more."""

    def visible(self, num_queries: int, num_keys: int, left: int, right: int) -> Tensor:
        return super().visible(num_queries, num_keys, left + 1 if left >= 0 else left, right)


class NarrowWindowKernel(FlashKernel):
    """A wrong one: the window counts the query itself."""

    def visible(self, num_queries: int, num_keys: int, left: int, right: int) -> Tensor:
        return super().visible(num_queries, num_keys, left - 1 if left > 0 else left, right)


class DeafKernel(FlashKernel):
    """A wrong one: the backward computes output and log-sum-exp again instead of taking the given ones."""

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, arguments: Arguments
    ) -> tuple[Tensor, Tensor, Tensor]:
        return super().backward(dout, q, k, v, *self.forward(q, k, v, arguments), arguments)


class StraightKernel(FlashKernel):
    """A wrong one: the backward forgets the slope of the soft-cap."""

    def _scores(self, q: Tensor, k: Tensor, arguments: Arguments) -> tuple[Tensor, Tensor]:
        scores, slope = super()._scores(q, k, arguments)
        return scores, torch.ones_like(slope)


# fmt: off
def aten_forward(kernel: FlashKernel) -> Any:
    """`aten::_flash_attention_forward` of torch 2.11 to 2.13."""

    def _flash_attention_forward(
        query: Tensor, key: Tensor, value: Tensor, cum_seq_q: Tensor, cum_seq_k: Tensor, max_q: int,
        max_k: int, dropout_p: float, is_causal: bool, return_debug_mask: bool, *, scale: float | None = None,
        window_size_left: int | None = None, window_size_right: int | None = None,
        seqused_k: Tensor | None = None, alibi_slopes: Tensor | None = None,
        block_table: Tensor | None = None, num_splits: int | None = None,
    ) -> tuple[Tensor, ...]:
        assert (dropout_p, return_debug_mask) == (0.0, False)
        assert (seqused_k, alibi_slopes, block_table, num_splits) == (None, None, None, None)
        arguments = Arguments(
            cum_seq_q, cum_seq_k, max_q, max_k, _scale(scale, query), is_causal,
            _limit(window_size_left), _limit(window_size_right),
        )
        rng_state, unused = (torch.empty(shape, dtype=torch.uint64) for shape in ((2,), ()))
        return *kernel.forward(query, key, value, arguments), rng_state, unused, query.new_empty(0)

    return _flash_attention_forward


def aten_backward(kernel: FlashKernel) -> Any:
    """`aten::_flash_attention_backward` of torch 2.11 to 2.13."""

    def _flash_attention_backward(
        grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor,
        cum_seq_q: Tensor, cum_seq_k: Tensor, max_q: int, max_k: int, dropout_p: float, is_causal: bool,
        rng_state: Tensor, unused: Tensor, *, scale: float | None = None,
        window_size_left: int | None = None, window_size_right: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert dropout_p == 0.0
        arguments = Arguments(
            cum_seq_q, cum_seq_k, max_q, max_k, _scale(scale, query), is_causal,
            _limit(window_size_left), _limit(window_size_right),
        )
        return kernel.backward(
            grad_out.contiguous(), query, key, value, out.contiguous(), logsumexp, arguments
        )

    return _flash_attention_backward


def aten_in_place(kernel: FlashKernel) -> Any:
    """The stand-in as torch's CPU kernel of the two operators, so that torch's own dispatcher checks the
    arguments. The library's `_destroy()` takes it away."""
    library: Any = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    library.impl("_flash_attention_forward", aten_forward(kernel), "CPU")
    library.impl("_flash_attention_backward", aten_backward(kernel), "CPU")
    return library


def flash_attn_in_place(
    monkeypatch: pytest.MonkeyPatch, kernel: FlashKernel, version: str = "2.8.3"
) -> Any:
    """The stand-in as an installed flash-attn package, 2.7 or 2.8."""

    def _flash_attn_varlen_forward(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
        max_seqlen_k: int, dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int = -1,
        window_size_right: int = -1, softcap: float = 0.0, alibi_slopes: Tensor | None = None,
        return_softmax: bool = False, block_table: Tensor | None = None, leftpad_k: Tensor | None = None,
        seqused_k: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        assert (dropout_p, return_softmax) == (0.0, False)
        assert (alibi_slopes, block_table, leftpad_k, seqused_k) == (None, None, None, None)
        arguments = Arguments(
            cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal,
            window_size_left, window_size_right, softcap,
        )
        q, k, v = map(_maybe_contiguous, (q, k, v))
        out, lse = kernel.forward(q, k, v, arguments)
        return out, lse, q.new_empty(0), torch.empty(2, dtype=torch.int64)

    def _flash_attn_varlen_backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor | None,
        dk: Tensor | None, dv: Tensor | None, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
        max_seqlen_k: int, dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int,
        window_size_right: int, softcap: float, alibi_slopes: Tensor | None, deterministic: bool,
        rng_state: Tensor | None = None,
    ) -> Tensor:
        assert (dropout_p, alibi_slopes) == (0.0, None)
        kernel.deterministic = deterministic
        arguments = Arguments(
            cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal,
            window_size_left, window_size_right, softcap,
        )
        dout, q, k, v, out = map(_maybe_contiguous, (dout, q, k, v, out))
        grads = kernel.backward(dout, q, k, v, out, softmax_lse, arguments)
        for given, grad in zip((dq, dk, dv), grads, strict=True):
            assert given is not None  # gradients that the package allocates itself are not handed out
            _require(given.dtype == q.dtype, "dq, dk and dv must have the same dtype as q")
            _require(given.stride(-1) == 1, "dq, dk and dv must have contiguous last dimension")
            _require(given.shape == grad.shape, "dq, dk and dv must have the shapes of q, k and v")
            given.copy_(grad)
        return torch.empty(q.shape[1], q.shape[0] + 128 * (len(cu_seqlens_q) - 1))

    package: Any = ModuleType("flash_attn")
    interface: Any = ModuleType("flash_attn.flash_attn_interface")
    package.__version__ = version
    interface._flash_attn_varlen_forward = _flash_attn_varlen_forward
    interface._flash_attn_varlen_backward = _flash_attn_varlen_backward
    for module in (package, interface):
        module.__spec__ = ModuleSpec(module.__name__, None)  # transformers asks for it
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return interface
# fmt: on


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(message)


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _per_head(x_SKD: Tensor, q: Tensor) -> Tensor:
    """(S, K, D) to (N, S, D), wide: kv head n // (N / K) serves query head n."""
    return x_SKD.to(_sum_dtype(q)).repeat_interleave(q.shape[1] // x_SKD.shape[1], dim=1).transpose(0, 1)


def _maybe_contiguous(x: Tensor) -> Tensor:
    return x.contiguous() if x.stride(-1) != 1 else x


def _scale(scale: float | None, q: Tensor) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


def _limit(size: int | None) -> int:
    return -1 if size is None else size
