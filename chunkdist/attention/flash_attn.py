"""`flash_attn`: the flash-attn package, version 2.7 or 2.8, by the functions beneath its autograd ones.

`flash_attn_varlen_func` keeps its output and log-sum-exp for its own backward; ours are the caller's
(attention sinks change them). The package is imported when it is used.

Read in the source distributions: flash_attn_interface.py of 2.7.0.post2, 2.7.1.post4, 2.7.4.post1 and 2.8.3,
and of 2.8.3 csrc/flash_attn/flash_api.cpp, src/mask.h, src/block_info.h, src/softmax.h and
src/flash_bwd_kernel.h. The conventions are those of `chunkdist.attention.varlen`. With a soft-cap c, scores
are c * tanh(scale * q.k / c), the log-sum-exp is of those, and the backward takes c again (0 for none).
Before 2.7 the signatures are others.
"""

from __future__ import annotations

import importlib
import re

import torch
from torch import Tensor

from chunkdist.attention.base import AttentionRow, AttentionVariant, RowGradient
from chunkdist.attention.varlen import (
    in_head_parts,
    must_be_deterministic,
    pack,
    readable_lse,
    sees_all_before,
    simulated_workspace,
    why_no_kernel,
    window_left,
    window_right,
)

_INSTALL = "pip install ninja packaging wheel && pip install --no-build-isolation 'flash-attn>=2.7,<3'"
"""Its setup imports torch, so it cannot be built in isolation, nor be an extra of ours."""


class FlashAttnBackend:
    name = "flash_attn"
    equal_head_dims = True

    def why_not(self, q: Tensor, variant: AttentionVariant) -> str | None:
        return why_no_kernel(q) or _why_no_package()

    def forward(self, row: AttentionRow) -> tuple[Tensor, Tensor]:
        q_TND, k_SKD, v_SKD = row.qkv
        packed = pack(row)
        interface = importlib.import_module("flash_attn.flash_attn_interface")
        out_TND, lse_NT, *_ = interface._flash_attn_varlen_forward(
            q_TND,
            k_SKD[packed.first_key :],
            v_SKD[packed.first_key :],
            packed.cu_q,
            packed.cu_k,
            packed.max_q,
            packed.max_k,
            dropout_p=0.0,
            softmax_scale=row.variant.scale,
            causal=sees_all_before(row),
            window_size_left=window_left(row),
            window_size_right=window_right(row),
            softcap=row.variant.softcap or 0.0,
        )
        return out_TND, lse_NT

    def backward(self, row: AttentionRow, given: RowGradient) -> Tensor:
        return in_head_parts(self._backward, row, given)

    def _backward(self, row: AttentionRow, given: RowGradient) -> Tensor:
        q_TND, k_SKD, v_SKD = row.qkv
        packed = pack(row)
        seen = slice(packed.first_key, None)
        dq_TND, dk, dv = (torch.empty_like(x) for x in (q_TND, k_SKD[seen], v_SKD[seen]))
        workspace = simulated_workspace(q_TND, k_SKD[seen], len(row.spans))
        interface = importlib.import_module("flash_attn.flash_attn_interface")
        interface._flash_attn_varlen_backward(
            given.grad_out_TND,
            q_TND,
            k_SKD[seen],
            v_SKD[seen],
            given.out_TND,
            readable_lse(given.lse_NT, q_TND),
            dq_TND,
            dk,
            dv,
            packed.cu_q,
            packed.cu_k,
            packed.max_q,
            packed.max_k,
            dropout_p=0.0,
            softmax_scale=row.variant.scale,
            causal=sees_all_before(row),
            window_size_left=window_left(row),
            window_size_right=window_right(row),
            softcap=row.variant.softcap or 0.0,
            alibi_slopes=None,
            deterministic=must_be_deterministic(),
        )
        del workspace
        for total, grad in zip(given.kv_grads, (dk, dv), strict=True):
            total[seen] += grad
        return dq_TND


def _why_no_package() -> str | None:
    try:
        version = getattr(importlib.import_module("flash_attn"), "__version__", "of an unknown version")
        importlib.import_module("flash_attn.flash_attn_interface")
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "flash_attn":
            return f"the flash-attn package is not installed: {_INSTALL}"
        return f"the flash-attn package does not load with torch {torch.__version__} ({error}): build it anew"
    release = re.match(r"(\d+)\.(\d+)", version)
    if release is None or not (2, 7) <= (int(release[1]), int(release[2])) < (3, 0):
        return f"it is written for flash-attn 2.7 and 2.8, {version} is installed: {_INSTALL}"
    return None
