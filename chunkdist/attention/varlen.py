"""`varlen`: torch's own CUDA flash attention for sequences of different lengths, by its aten operators.

`torch.nn.attention.varlen.varlen_attn` calls the same operators, but hands its own output and log-sum-exp to
its backward; ours are the caller's (attention sinks change them).

Read in the wheels of torch 2.11.0 and 2.13.0 (native_functions.yaml, nn/attention/varlen.py,
_meta_registrations.py) and, at pytorch commit 03b7c19d, in
aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp (mha_varlen_fwd, mha_varlen_bwd), which calls
the kernels of flash-attn 2:
- Sequence b has queries [cu_q[b], cu_q[b + 1]) and keys [cu_k[b], cu_k[b + 1]), both int32 and contiguous.
- Query i of a sequence of n queries and m keys is at key i + m - n (bottom-right), and sees the keys from
  `window_size_left` before to `window_size_right` after it, -1 for all: a window of w tokens is (w - 1, 0).
- The log-sum-exp is (N, T), fp32, natural. The backward takes it for fp32 and contiguous, without a check.
- q, k and v need unit stride in D only. dk and dv come per kv head; keys of no sequence get no value at all.
- Without dropout the backward does not read `rng_state`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from chunkdist.attention.base import AttentionRow, AttentionVariant, RowGradient

MAX_HEAD_DIM = 256
SCRATCH_BYTES = 2**29
"""What the backward's gradients of K and V for each query head may take, before they are summed. Longer
prefixes have their kv heads taken in parts, which are large enough to keep a GPU busy."""


class VarlenBackend:
    name = "varlen"
    equal_head_dims = True

    def why_not(self, q: Tensor, variant: AttentionVariant) -> str | None:
        if (reason := why_no_kernel(q)) is not None:
            return reason
        if variant.softcap is not None:
            return "torch's kernel has no soft-cap"
        if isinstance(q, FakeTensor):
            return None
        if not torch.backends.cuda.is_flash_attention_available():
            return "this torch was built without flash attention"
        return None

    def forward(self, row: AttentionRow) -> tuple[Tensor, Tensor]:
        q_TND, k_SKD, v_SKD = row.qkv
        packed = pack(row)
        out_TND, lse_NT, *_ = torch.ops.aten._flash_attention_forward(
            q_TND,
            k_SKD[packed.first_key :],
            v_SKD[packed.first_key :],
            packed.cu_q,
            packed.cu_k,
            packed.max_q,
            packed.max_k,
            0.0,
            sees_all_before(row),
            False,
            scale=row.variant.scale,
            window_size_left=window_left(row),
            window_size_right=window_right(row),
        )
        return out_TND, lse_NT

    def backward(self, row: AttentionRow, given: RowGradient) -> Tensor:
        return in_head_parts(self._backward, row, given)

    def _backward(self, row: AttentionRow, given: RowGradient) -> Tensor:
        q_TND, k_SKD, v_SKD = row.qkv
        packed = pack(row)
        keys = k_SKD[packed.first_key :]
        workspace = simulated_workspace(q_TND, keys, len(row.spans))
        dq_TND, dk, dv = torch.ops.aten._flash_attention_backward(
            given.grad_out_TND,
            q_TND,
            keys,
            v_SKD[packed.first_key :],
            given.out_TND,
            readable_lse(given.lse_NT, q_TND),
            packed.cu_q,
            packed.cu_k,
            packed.max_q,
            packed.max_k,
            0.0,
            sees_all_before(row),
            torch.empty(2, dtype=torch.uint64, device=q_TND.device),
            torch.empty((), dtype=torch.uint64, device=q_TND.device),
            scale=row.variant.scale,
            window_size_left=window_left(row),
            window_size_right=window_right(row),
        )
        del workspace
        for total, grad in zip(given.kv_grads, (dk, dv), strict=True):
            total[packed.first_key :] += grad
        return cast(Tensor, dq_TND)


def in_head_parts(
    backward: Callable[[AttentionRow, RowGradient], Tensor],
    row: AttentionRow,
    given: RowGradient,
    *,
    most_bytes: int | None = None,
) -> Tensor:
    """A backend's `backward` of some of the kv heads and their query heads at a time, so that what the kernel
    allocates for itself stays within `most_bytes`; `None`: `SCRATCH_BYTES`."""
    q_TND, k_SKD, v_SKD = row.qkv
    (num_keys, num_kv_heads, head_dim), num_heads = k_SKD.shape, q_TND.shape[1]
    group = num_heads // num_kv_heads
    scratch_bytes = 2 * num_keys * group * head_dim * k_SKD.element_size()  # of one kv head
    at_once = num_kv_heads if group == 1 else max(1, (most_bytes or SCRATCH_BYTES) // scratch_bytes)
    dqs = []
    for first in range(0, num_kv_heads, at_once):
        kv = slice(first, first + at_once)
        q = slice(first * group, (first + at_once) * group)
        part = replace(row, q_TND=q_TND[:, q], k_SKD=k_SKD[:, kv], v_SKD=v_SKD[:, kv])
        dk_SKD, dv_SKD = given.kv_grads
        kv_grads = dk_SKD[:, kv], dv_SKD[:, kv]
        dqs.append(
            backward(
                part, RowGradient(given.grad_out_TND[:, q], given.out_TND[:, q], given.lse_NT[q], kv_grads)
            )
        )
    return dqs[0] if len(dqs) == 1 else torch.cat(dqs, dim=1)


class Packing(NamedTuple):
    """The spans as the kernels take them, counted from the first key that any query sees."""

    first_key: int
    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int


def pack(row: AttentionRow) -> Packing:
    """Cumulative lengths, (num_spans + 1,) int32 each, on q's device.

    Keys before the first span, or before the window of its first query, are cut off by a view: the kernels
    would leave their gradients unwritten, or sweep over them in vain.
    """
    q, spans, window = row.q_TND, row.spans, row.variant.window
    first = spans[0]
    first_key = first.k_start
    if window is not None:
        first_key = max(first_key, row.first_query_at(first) - (window - 1))
    q_ends = (0, *(span.q_end for span in spans))
    k_ends = (0, *(span.k_end - first_key for span in spans))
    if isinstance(q, FakeTensor):
        cu_q, cu_k = torch.tensor([q_ends, k_ends], dtype=torch.int32, device=q.device)
    else:
        stream = torch.cuda.current_stream(q.device).stream_id if q.device.type == "cuda" else 0
        cu_q, cu_k = _on_device(q_ends, k_ends, q.device, stream)
    return Packing(first_key, cu_q, cu_k, _longest(q_ends), _longest(k_ends))


@lru_cache(maxsize=1024)
def _on_device(
    q_ends: tuple[int, ...], k_ends: tuple[int, ...], device: torch.device, stream: int
) -> tuple[Tensor, Tensor]:
    """The same for all layers of a chunk, so one copy is made for them, and kept for the stream on which it
    was made."""
    with torch.inference_mode(False):
        # From pinned memory, since a copy from pageable memory waits for the stream.
        pinned = device.type == "cuda"
        lengths = torch.tensor([q_ends, k_ends], dtype=torch.int32, pin_memory=pinned)
        cu_q, cu_k = lengths.to(device, non_blocking=True).unbind()
    return cu_q, cu_k


def sees_all_before(row: AttentionRow) -> bool:
    """Whether the kernels' causal mask is all there is to the row's."""
    return row.variant.window is None and row.gap is None


def window_left(row: AttentionRow) -> int:
    """The kernels' left window, -1 for all: tokens before the query, itself not counted, where they align the
    last query with the last key."""
    if row.variant.window is None:
        return -1
    moved = 0 if row.gap is None else row.gap + row.spans[0].q_end - row.spans[0].q_start
    return row.variant.window - 1 - moved


def window_right(row: AttentionRow) -> int:
    """The kernels' right window, -1 for all."""
    return 0 if row.gap is None else -1


def readable_lse(lse_NT: Tensor, q: Tensor) -> Tensor:
    """The log-sum-exp in the layout that the kernels assume and do not check."""
    assert lse_NT.dtype == torch.promote_types(q.dtype, torch.float32), lse_NT.dtype
    return lse_NT.contiguous()


def why_no_nvidia_gpu(q: Tensor) -> str | None:
    """Why kernels for NVIDIA GPUs cannot take `q`; `None`: they can."""
    if q.device.type != "cuda":
        return f"it runs on an NVIDIA GPU, the tensors are on {q.device.type}"
    if torch.version.hip is not None:
        # torch 2.11 lays the log-sum-exp out as (sequences, N, max_q) there
        return "it runs on an NVIDIA GPU, this torch is built for ROCm"
    return None


def why_no_kernel(q: Tensor) -> str | None:
    """The limits of flash-attn 2's kernels, whoever built them. Fake tensors pass on any device."""
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"it takes float16 and bfloat16, the tensors are {str(q.dtype).removeprefix('torch.')}"
    head_dim = q.shape[-1]
    if head_dim > MAX_HEAD_DIM or head_dim % 8:
        return f"it takes head dims up to {MAX_HEAD_DIM} that 8 divides, this one is {head_dim}"
    if isinstance(q, FakeTensor):
        return None
    if (why_not := why_no_nvidia_gpu(q)) is not None:
        return why_not
    major, minor = torch.cuda.get_device_capability(q.device)
    if major < 8:
        return f"it needs compute capability 8.0, the GPU has {major}.{minor}"
    return None


def must_be_deterministic() -> bool:
    """Whether `torch.use_deterministic_algorithms` forbids others, beyond a warning."""
    return (
        torch.are_deterministic_algorithms_enabled()
        and not torch.is_deterministic_algorithms_warn_only_enabled()
    )


def simulated_workspace(q_TND: Tensor, k_SKD: Tensor, num_spans: int) -> tuple[Tensor, ...]:
    """With fake tensors, what the kernels' backward allocates (mha_varlen_bwd) and its fake version does not,
    so that simulated memory is the real one: dq in fp32 and, with fewer kv heads than query heads, dk and dv
    per query head.
    """
    if not isinstance(q_TND, FakeTensor):
        return ()
    num_tokens, num_heads, head_dim = q_TND.shape
    rounding = 32 if head_dim <= 128 else 64
    padded_tokens, padded_dim = num_tokens + 128 * num_spans, -(-head_dim // rounding) * rounding
    dq_sum = q_TND.new_empty((padded_tokens, num_heads, padded_dim), dtype=torch.float32)
    row_dot = q_TND.new_empty((num_heads, padded_tokens), dtype=torch.float32)
    if k_SKD.shape[1] == num_heads:
        return dq_sum, row_dot
    dk, dv = (k_SKD.new_empty((k_SKD.shape[0], num_heads, head_dim)) for _ in range(2))
    return dq_sum, row_dot, dk, dv


def _longest(ends: tuple[int, ...]) -> int:
    return max(end - start for start, end in pairwise(ends))
