"""A kernel whose conventions nobody promises is compared with `math`, when it is first used on a device."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from chunkdist.attention.base import AttentionRow, AttentionVariant, Backend, RowGradient, Span
from chunkdist.attention.math import MathBackend
from chunkdist.recovery import is_out_of_memory

LARGEST_ERROR = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 3e-5}
"""Bound, relative to the norm: more than rounding makes, less than another convention."""


def what_is_wrong(
    backends: Iterable[tuple[Backend, int]], device: torch.device, dtype: torch.dtype, head_dim: int
) -> str | None:
    """Runs a small case with each backend and number of kv heads; `None`: all are right.

    Raises:
        RuntimeError: there is too little memory for it.
    """
    generator = torch.Generator().manual_seed(0)
    for backend, num_kv_heads in backends:
        shapes = ((256, 4, head_dim), (512, num_kv_heads, head_dim))
        tensors = [
            torch.randn(shapes[is_key], generator=generator, device="cpu").to(device, dtype)
            for is_key in (0, 1, 1, 0)
        ]
        try:
            found = _small_case(backend, *tensors)
        except RuntimeError as refusal:
            if is_out_of_memory(refusal):
                raise
            return f"{backend.name} refuses: {str(refusal).strip().splitlines()[0]}"
        truth = _small_case(MathBackend(), *(x.double() for x in tensors))
        for name, x, expected in zip(("out", "lse", "dq", "dk", "dv"), found, truth, strict=True):
            error = float((x.double() - expected).norm() / expected.norm())
            if not error <= LARGEST_ERROR[dtype]:
                return f"on this device its {name} is off by {error:.1e} (of the norm)"
    return None


def _small_case(backend: Backend, q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor) -> list[Tensor]:
    """128 queries after 256 keys, and a sequence of 128."""
    spans = (Span(0, 128, 0, 384), Span(128, 256, 384, 512))
    variant = AttentionVariant(scale=q.shape[-1] ** -0.5)
    row = AttentionRow(q, k, v, spans, variant)
    out, lse = backend.forward(row)
    wide = torch.promote_types(q.dtype, torch.float32)
    kv_grads = torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
    dq = backend.backward(row, RowGradient(grad_out, out, lse, kv_grads))
    return [out, lse, dq, *kv_grads]
