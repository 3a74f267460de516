"""`cudnn`: cuDNN's attention by torch's operators, cut in squares.

On Hopper its makers give it about twice the rate of FlashAttention-2. It builds a plan for each shape, in
each thread, which takes about half a second and is kept for the process: for long sequences in chunks of one
size.

Only queries and prefixes of multiples of 128 tokens go there. What is known of wrong results (NaN, or wrong
gradients, for single queries and for 64 keys past a multiple of 128: pytorch issues 193893 and 196678,
cudnn-frontend issue 1072; wild reads, before 9.15.1: pytorch issue 169849) is at other lengths, and those, a
sequence's last chunk and most segments of packed rows, go to `varlen`.

Read in pytorch's sources (aten/src/ATen/native/cudnn/MHA.cpp, native/transformers/cuda/attention.cu and
attention_backward.cu, several versions) and in _meta_registrations.py of torch 2.13.0:
- Tensors are (B, heads, tokens, D); fewer kv heads than query heads need no copies; D has unit stride.
- The log-sum-exp is fp32, natural, of the scaled scores; (B, N, T, 1) and contiguous, earlier (B, N, T).
- A plan of the backward is found again, in some versions, by the layouts of q, k and v alone, though it holds
  those of the output and its gradient, too: here, these two are laid out as q is.
- Without dropout neither seed nor offset is read. The backward's sums are in no fixed order.

None of this is promised, so the first use on a device is checked against `math`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from itertools import groupby

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from chunkdist.attention.base import AttentionRow, AttentionVariant, RowGradient, Span
from chunkdist.attention.first_use import what_is_wrong
from chunkdist.attention.prefix_and_diagonal import (
    backward_in_squares,
    forward_in_squares,
    heads_first,
    joined,
)
from chunkdist.attention.varlen import (
    VarlenBackend,
    in_head_parts,
    must_be_deterministic,
    simulated_workspace,
    why_no_kernel,
)

OLDEST_CUDNN = 91501
MULTIPLE = 128
"""Queries and prefixes must be multiples of this many tokens."""


class CudnnBackend:
    name = "cudnn"
    equal_head_dims = True

    def __init__(self, *, most_bytes: int | None = None) -> None:
        """`most_bytes`: as in `in_head_parts`."""
        self._most_bytes = most_bytes

    def why_not(self, q: Tensor, variant: AttentionVariant) -> str | None:
        if (reason := why_no_kernel(q)) is not None:
            return reason
        if (reason := _OTHERS.why_not(q, variant)) is not None:
            return f"varlen, which takes what it leaves, cannot: {reason}"
        if variant.window is not None:
            return "it is run without a sliding window here"
        if must_be_deterministic():
            return "its backward is not deterministic"
        if isinstance(q, FakeTensor):
            return None
        if (version := torch.backends.cudnn.version() or 0) < OLDEST_CUDNN:
            return f"it needs cuDNN {OLDEST_CUDNN}, this torch has {version or 'none'}"
        return why_wrong(q.device, q.dtype, q.shape[-1])

    def forward(self, row: AttentionRow) -> tuple[Tensor, Tensor]:
        kernel = partial(_run_forward, scale=row.variant.scale)
        row = replace(row, q_TND=row.q_TND.contiguous())
        return joined(
            [
                forward_in_squares(kernel, part) if fits else _OTHERS.forward(part)
                for fits, part, _, _ in _by_kernel(row)
            ]
        )

    def backward(self, row: AttentionRow, given: RowGradient) -> Tensor:
        kernel = partial(_run_backward, scale=row.variant.scale)
        row = replace(row, q_TND=row.q_TND.contiguous())
        grad_out_TND, out_TND = given.grad_out_TND.contiguous(), given.out_TND.contiguous()
        dk_SKD, dv_SKD = given.kv_grads
        dq_TND = torch.empty_like(row.q_TND)
        for fits, part, queries, keys in _by_kernel(row):
            own = RowGradient(
                grad_out_TND[queries],
                out_TND[queries],
                given.lse_NT[:, queries],
                (dk_SKD[keys], dv_SKD[keys]),
            )
            if fits:
                squares = partial(backward_in_squares, kernel)
                dq_TND[queries] = in_head_parts(squares, part, own, most_bytes=self._most_bytes)
            else:
                dq_TND[queries] = _OTHERS.backward(part, own)
        return dq_TND


_OTHERS = VarlenBackend()


def _by_kernel(row: AttentionRow) -> Iterator[tuple[bool, AttentionRow, slice, slice]]:
    """The row in parts that cuDNN takes, or does not, each with its queries and keys in the row."""

    def fits(span: Span) -> bool:
        num_queries = span.q_end - span.q_start
        return num_queries % MULTIPLE == 0 and (span.k_end - span.k_start) % MULTIPLE == 0

    for is_for_cudnn, neighbours in groupby(row.spans, key=fits):
        own = tuple(neighbours)
        q, k = own[0].q_start, own[0].k_start
        moved = tuple(Span(s.q_start - q, s.q_end - q, s.k_start - k, s.k_end - k) for s in own)
        queries, keys = slice(q, own[-1].q_end), slice(k, own[-1].k_end)
        part = replace(
            row, q_TND=row.q_TND[queries], k_SKD=row.k_SKD[keys], v_SKD=row.v_SKD[keys], spans=moved
        )
        yield is_for_cudnn, part, queries, keys


def _run_forward(
    q_TND: Tensor, k_SKD: Tensor, v_SKD: Tensor, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *map(heads_first, (q_TND, k_SKD, v_SKD)), None, True, 0.0, causal, False, scale=scale
    )
    return out[0].transpose(0, 1), lse.reshape(q_TND.shape[1], q_TND.shape[0])


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
    workspace = simulated_workspace(q_TND, k_SKD, 1)  # what it takes is not known: as much as flash attention
    unread = torch.empty((), dtype=torch.int64, device=q_TND.device)
    grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        *map(heads_first, (grad_out_TND, q_TND, k_SKD, v_SKD, out_TND)),
        lse_NT.contiguous()[None, :, :, None],
        *(unread, unread, None, None, None),
        *(q_TND.shape[0], k_SKD.shape[0], 0.0, causal),
        scale=scale,
    )
    del workspace
    dq_TND, dk_SKD, dv_SKD = (grad[0].transpose(0, 1) for grad in grads)
    return [dq_TND], dk_SKD, dv_SKD


@cache
def why_wrong(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """The first use, with and without shared kv heads, and with heads in parts, whose tensors are laid out
    otherwise."""
    backends = ((CudnnBackend(), 2), (CudnnBackend(), 4), (CudnnBackend(most_bytes=1), 2))
    return what_is_wrong(backends, device, dtype, head_dim)
