"""`cudnn`: cuDNN's attention by torch's operators, cut in squares.

On Hopper its makers give it about twice the rate of FlashAttention-2. It builds a plan for each shape, which
takes a good part of a second and is kept for the process: for long sequences in chunks of one size, not for
packed rows, whose segments have every length.

Read in pytorch's sources (aten/src/ATen/native/cudnn/MHA.cpp, native/transformers/cuda/attention.cu and
attention_backward.cu, several versions) and in _meta_registrations.py of torch 2.13.0:
- Tensors are (B, heads, tokens, D); fewer kv heads than query heads need no copies; D has unit stride.
- The log-sum-exp is fp32, natural, of the scaled scores; (B, N, T, 1) and contiguous, earlier (B, N, T).
- A plan of the backward is found again, in some versions, by the layouts of q, k and v alone, though it holds
  those of the output and its gradient, too: here, these are always contiguous in (T, N, D).
- Without dropout neither seed nor offset is read. The backward's sums are in no fixed order.

None of this is promised, so the first use on a device is checked against `math`.
"""

from __future__ import annotations

from functools import cache, partial

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from chunkdist.attention.base import AttentionVariant, Backend, Span
from chunkdist.attention.math import MathBackend
from chunkdist.attention.squares import backward_in_squares, forward_in_squares, heads_first
from chunkdist.attention.varlen import in_head_parts, simulated_workspace, why_no_kernel

OLDEST_CUDNN = 90000
LARGEST_ERROR = {torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Of the norm, in the check of the first use: more than rounding makes, less than another convention."""


class CudnnBackend:
    name = "cudnn"
    equal_head_dims = True

    def why_not(self, q: Tensor, variant: AttentionVariant) -> str | None:
        if (reason := why_no_kernel(q)) is not None:
            return reason
        if variant.window is not None:
            return "it is run without a sliding window here"
        if variant.softcap is not None:
            return "it has no soft-cap"
        if (
            torch.are_deterministic_algorithms_enabled()
            and not torch.is_deterministic_algorithms_warn_only_enabled()
        ):
            return "its backward is not deterministic"
        if isinstance(q, FakeTensor):
            return None
        if (version := torch.backends.cudnn.version() or 0) < OLDEST_CUDNN:
            return f"it needs cuDNN {OLDEST_CUDNN}, this torch has {version or 'none'}"
        return why_wrong(q.device, q.dtype, q.shape[-1])

    def forward(
        self, q_TND: Tensor, k_SKD: Tensor, v_SKD: Tensor, spans: tuple[Span, ...], variant: AttentionVariant
    ) -> tuple[Tensor, Tensor]:
        kernel = partial(_run_forward, scale=variant.scale)
        out_TND, lse_NT = forward_in_squares(kernel, q_TND.contiguous(), k_SKD, v_SKD, spans)
        return out_TND.contiguous(), lse_NT

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
        kernel = partial(_run_backward, scale=variant.scale)
        of_heads = partial(backward_in_squares, kernel, spans=spans)
        grad_out_TND, q_TND, out_TND = (x.contiguous() for x in (grad_out_TND, q_TND, out_TND))
        return in_head_parts(of_heads, grad_out_TND, q_TND, k_SKD, v_SKD, out_TND, lse_NT, kv_grads)


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
    """Runs a small case, with and without shared kv heads, and compares what comes of it with `math`."""
    generator = torch.Generator().manual_seed(0)
    for num_kv_heads in (2, 4):
        shapes = ((130, 4, head_dim), (230, num_kv_heads, head_dim))
        tensors = [
            torch.randn(shapes[is_key], generator=generator).to(device, dtype) for is_key in (0, 1, 1, 0)
        ]
        try:
            found = _small_case(CudnnBackend(), *tensors)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as refusal:
            return f"cuDNN refuses: {str(refusal).strip().splitlines()[0]}"
        truth = _small_case(MathBackend(), *(x.double() for x in tensors))
        for name, x, expected in zip(("out", "lse", "dq", "dk", "dv"), found, truth, strict=True):
            error = float((x.double() - expected).norm() / expected.norm())
            if not error <= LARGEST_ERROR[dtype]:
                return f"on this device its {name} is off by {error:.1e} (of the norm)"
    return None


def _small_case(backend: Backend, q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor) -> list[Tensor]:
    """129 queries after 100 keys, and a sequence of one."""
    spans = (Span(0, 129, 0, 229), Span(129, 130, 229, 230))
    variant = AttentionVariant(scale=q.shape[-1] ** -0.5)
    out, lse = backend.forward(q, k, v, spans, variant)
    wide = torch.promote_types(q.dtype, torch.float32)
    kv_grads = torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
    dq = backend.backward(grad_out, q, k, v, out, lse, kv_grads, spans, variant)
    return [out, lse, dq, *kv_grads]
