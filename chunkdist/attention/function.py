"""Attention of a running cell: the function that transformers calls.

B rows, T tokens of the chunk, N query heads, K kv heads, D head dim.
"""

from __future__ import annotations

import inspect
import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.modeling_flash_attention_utils import _flash_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from chunkdist.attention.base import AttentionVariant
from chunkdist.attention.cell import LAYER_ATTRIBUTE, KeysAndValues, LayerState
from chunkdist.attention.mask import ChunkMask
from chunkdist.attention.node import chunk_attention
from chunkdist.errors import UnsupportedModelError
from chunkdist.stream.stream import Stream

ATTENTION_NAME = "chunkdist"
"""The name under which `attend` is registered with transformers' `AttentionInterface`."""

_HARMLESS = frozenset(
    (
        *("position_ids", "cache_position", "position_embeddings", "seq_idx", "layer_idx", "layer_id"),
        *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),
        *("labels", "shift_labels", "num_items_in_batch", "logits_to_keep", "skip_logits"),
        *("use_cache", "return_dict", "output_hidden_states", "output_router_logits", "ignore_index"),
    )
)
"""Arguments that layers hand on to their attention and that change nothing in it."""


@cache
def _read_by_kernels(module_name: str) -> frozenset[str]:
    """What transformers' kernels, and the eager one of a model's own file, take by name: no other argument
    changes what they compute."""
    eager = getattr(sys.modules.get(module_name), "eager_attention_forward", None)
    kernels = [*ALL_ATTENTION_FUNCTIONS.values(), _flash_attention_forward, *([eager] if eager else [])]
    return frozenset(name for kernel in kernels for name in inspect.signature(kernel).parameters) | _OPTIONS


_OPTIONS = frozenset(("output_attentions", "kernel_options"))
"""What they look up in their keyword arguments (transformers 5.23)."""


@torch.compiler.disable  # type: ignore[untyped-decorator]  # the rest of a compiled layer is compiled
def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: ChunkMask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,  # the mask says it
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of the running cell over the stored prefix, as transformers' `AttentionInterface` calls it.

    Args:
        query: (B, N, T, D); key, value: (B, K, T, D), of the chunk.
        s_aux: (N,) attention sinks.

    Returns:
        (B, T, N, D), contiguous, and no attention weights.

    Raises:
        UnsupportedModelError: the call asks for something that would not be computed exactly.
    """
    state: LayerState | None = module.__dict__.get(LAYER_ATTRIBUTE)
    name = type(module).__name__
    if state is None or state.cell is None:
        raise UnsupportedModelError(f"{name} attends outside of a chunked decoder layer")
    cell = state.cell
    cell.num_calls += 1
    mask = _understood(name, attention_mask, sliding_window)
    _refuse_unsupported(name, type(module).__module__, dropout, kwargs)
    if cell.store is None or cell.num_calls > 1:
        raise UnsupportedModelError(
            f"{state.name} calls its attention more than once: its K/V cannot be told apart"
        )
    if query.shape[2] != cell.chunk.num_tokens or key.shape[2] != cell.chunk.num_tokens:
        raise UnsupportedModelError(
            f"{name} attends from {query.shape[2]} queries to {key.shape[2]} keys in a chunk of "
            f"{cell.chunk.num_tokens} tokens: cross-attention and shared or compressed K/V cannot be chunked"
        )
    query, key, value = _in_one_dtype(query, key, value)
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    window = _window_in(cell.whole, mask.window)
    if mask.block is not None and cell.whole.branches:
        raise UnsupportedModelError(
            f"{name} attends in blocks of {mask.block} tokens, which shared prefixes would cut: write "
            "share_prefixes=False"
        )
    variant = AttentionVariant(scale=scale, window=window, softcap=softcap or None)
    backend = cell.choice.backend_for(query, variant)
    q_BTND, k_BTKD, v_BTKD = (x.transpose(1, 2) for x in (query, key, value))
    value_dim = v_BTKD.shape[-1]
    if backend.equal_head_dims and value_dim != q_BTND.shape[-1]:
        v_BTKD = F.pad(v_BTKD, (0, q_BTND.shape[-1] - value_dim))
    exchange = cell.exchange
    if exchange is not None:
        exchange.check(name, query.shape[1], key.shape[1])
    if cell.stop_at_kv:
        raise KeysAndValues(*((k_BTKD, v_BTKD) if exchange is None else exchange.to_heads(k_BTKD, v_BTKD)))
    sink_N = None if s_aux is None else s_aux.reshape(-1)
    if exchange is not None:
        q_BTND, k_BTKD, v_BTKD = exchange.to_heads(q_BTND, k_BTKD, v_BTKD)
        sink_N = None if sink_N is None else exchange.own(sink_N)
    out_BTND = chunk_attention(cell, backend, variant, mask.block, (q_BTND, k_BTKD, v_BTKD, sink_N))
    out_BTND = out_BTND[..., :value_dim]
    if exchange is not None:
        out_BTND = exchange.to_tokens(out_BTND)
    return out_BTND.contiguous(), None  # as transformers promises: some models call `.view`


def _understood(name: str, mask: ChunkMask | Tensor | None, sliding_window: int | None) -> ChunkMask:
    """The layer's mask, if it can be chunked. A window passed beside it may only repeat it."""
    if not isinstance(mask, ChunkMask):
        what = "without a mask" if mask is None else "with a mask of its own"
        raise UnsupportedModelError(
            f"{name} attends {what}: only masks made by transformers' masking_utils can be told apart; "
            "pass no 4-dimensional attention_mask"
        )
    if mask.unsupported is not None:
        raise UnsupportedModelError(f"{name} has a mask that is not chunked: {mask.unsupported}")
    if sliding_window is not None and sliding_window != mask.window:
        raise UnsupportedModelError(
            f"{name} passes a window of {sliding_window} tokens, its mask has {mask.window or 'none'}: "
            "cannot tell which one is meant"
        )
    return mask


def _refuse_unsupported(name: str, module_name: str, dropout: float, kwargs: dict[str, Any]) -> None:
    if dropout:
        raise UnsupportedModelError(
            f"{name} drops attention weights with probability {dropout}, which no backend does: set the "
            "model's attention dropout to 0"
        )
    given = {key for key, x in kwargs.items() if x is not None and x is not False} - _HARMLESS
    unknown = given & _read_by_kernels(module_name)
    if unknown:
        raise UnsupportedModelError(
            f"{name} passes {', '.join(sorted(unknown))} to its attention, unknown to the chunked one"
        )


def _in_one_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Casts q, k and v to one dtype as `scaled_dot_product_attention` does: autocast's, else the values'."""
    device_type = tensors[0].device.type
    if torch.is_autocast_enabled(device_type) and tensors[0].dtype != torch.float64:
        return tuple(x.to(torch.get_autocast_dtype(device_type)) for x in tensors)
    dtype = tensors[-1].dtype  # values pass through no rotary embedding, which is sometimes in fp32
    return tuple(x.to(dtype) for x in tensors)


def _window_in(stream: Stream, window: int | None) -> int | None:
    """No window where the whole stream fits in it: more kernels can do that."""
    return None if window is None or window >= stream.num_tokens else window
