"""Attention of a running cell: the function that transformers calls, and its autograd node.

B rows, T tokens of the chunk, S of the keys it sees, N query heads, K kv heads, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from chunkdist.attention import AttentionChoice
from chunkdist.attention.base import AttentionRow, AttentionVariant, Backend, RowGradient, Span
from chunkdist.attention.mask import ChunkMask
from chunkdist.errors import UnsupportedModelError
from chunkdist.replay import without_autocast
from chunkdist.stores.kv_store import KVStore
from chunkdist.stores.state_relay import StateRelay
from chunkdist.stream.stream import Chunk, Stream

ATTENTION_NAME = "chunkdist"
"""The name under which `attend` is registered with transformers' `AttentionInterface`."""

LAYER_ATTRIBUTE = "_chunkdist_layer"
"""Set on the modules inside a chunked layer: how `attend` finds the cell of the module that called it."""

_HARMLESS = frozenset(
    (
        *("position_ids", "cache_position", "position_embeddings", "seq_idx", "layer_idx", "layer_id"),
        *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),
        *("labels", "shift_labels", "num_items_in_batch", "logits_to_keep", "skip_logits"),
        *("use_cache", "return_dict", "output_hidden_states", "ignore_index"),
    )
)
"""Arguments that layers hand on to their attention and that change nothing in it."""


class KeysAndValues(Exception):
    """Ends the run of a layer as soon as its keys and values are there, and carries them, (B, T, K, D)."""

    def __init__(self, k_BTKD: Tensor, v_BTKD: Tensor) -> None:
        super().__init__()
        self.k_BTKD, self.v_BTKD = k_BTKD, v_BTKD


@dataclass
class Cell:
    """One layer's part of a running cell.

    Args:
        chunk: The tokens.
        store: K/V of the layer; `None` where no attention is expected.
        stop_at_kv: Raise `KeysAndValues` instead of attending.
        relay: The layer's cache, where layers keep state other than K/V.
    """

    chunk: Chunk
    stream: Stream
    store: KVStore | None
    choice: AttentionChoice
    stop_at_kv: bool = False
    relay: StateRelay | None = None
    num_calls: int = 0

    def visible(self, row: int, window: int | None, block: int | None) -> tuple[int, tuple[Span, ...]]:
        """The first key that any query of this chunk sees, and the spans relative to it.

        Blocks of `block` tokens, counted from the start of a segment, are to attention what segments are.
        """
        chunk, starts = self.chunk, self.stream.segment_starts[row]
        ends = (*starts[1:], self.stream.num_tokens)
        if block is not None:
            cuts = [range(start, end, block) for start, end in zip(starts, ends, strict=True)]
            starts = tuple(start for cut in cuts for start in cut)
            ends = (*starts[1:], self.stream.num_tokens)
        origin, spans = None, []
        for seg_start, seg_end in zip(starts, ends, strict=True):
            q_start, q_end = max(seg_start, chunk.start), min(seg_end, chunk.end)
            if q_start >= q_end:
                continue
            k_start = seg_start if window is None else max(seg_start, q_start - window + 1)
            origin = k_start if origin is None else origin
            spans.append(Span(q_start - chunk.start, q_end - chunk.start, k_start - origin, q_end - origin))
        assert origin is not None
        return origin, tuple(spans)


@dataclass
class LayerState:
    """What the modules of one layer share: the cell that runs now, if any.

    Args:
        relays: Whether the layer gets a cache: one of the model's layers keeps state other than K/V.
        mixes: Whether it has modules that look at other tokens and are not attention.
        tokenwise: Whether each token passes through it alone.
    """

    name: str
    relays: bool = False
    mixes: bool = False
    tokenwise: bool = False
    cell: Cell | None = None


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
    _refuse_unsupported(name, dropout, kwargs)
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
    window = _window_in(cell.stream, mask.window)
    variant = AttentionVariant(scale=scale, window=window, softcap=softcap or None)
    backend = cell.choice.backend_for(query, variant)
    q_BTND, k_BTKD, v_BTKD = (x.transpose(1, 2) for x in (query, key, value))
    value_dim = v_BTKD.shape[-1]
    if backend.equal_head_dims and value_dim != q_BTND.shape[-1]:
        v_BTKD = F.pad(v_BTKD, (0, q_BTND.shape[-1] - value_dim))
    if cell.stop_at_kv:
        raise KeysAndValues(k_BTKD, v_BTKD)
    sink_N = None if s_aux is None else s_aux.reshape(-1)
    inputs = (q_BTND, k_BTKD, v_BTKD, sink_N)
    out: Tensor = _ChunkAttention.apply(cell, backend, variant, mask.block, *inputs)  # type: ignore[no-untyped-call]
    return out[..., :value_dim].contiguous(), None  # as transformers promises: some models call `.view`


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


def _refuse_unsupported(name: str, dropout: float, kwargs: dict[str, Any]) -> None:
    if dropout:
        raise UnsupportedModelError(
            f"{name} drops attention weights with probability {dropout}, which no backend does: set the "
            "model's attention dropout to 0"
        )
    unknown = [key for key, x in kwargs.items() if x is not None and x is not False and key not in _HARMLESS]
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


class _ChunkAttention(torch.autograd.Function):
    """Stores the chunk's K/V and attends to the prefix; the backward leaves the prefix's gradients in the
    store, and takes there what later chunks left for this one."""

    @staticmethod
    def forward(
        ctx: Any,
        cell: Cell,
        backend: Backend,
        variant: AttentionVariant,
        block: int | None,
        q_BTND: Tensor,
        k_BTKD: Tensor,
        v_BTKD: Tensor,
        sink_N: Tensor | None,
    ) -> Tensor:
        store = cell.store
        assert store is not None
        store.write(cell.chunk, k_BTKD, v_BTKD)
        outs, lses = [], []
        with without_autocast(q_BTND.device.type):
            for row, q_TND in enumerate(q_BTND):
                origin, spans = cell.visible(row, variant.window, block)
                keys_and_values = store.read(row, origin, cell.chunk.end)
                out_TND, lse_NT = backend.forward(AttentionRow(q_TND, *keys_and_values, spans, variant))
                if sink_N is not None:
                    lse_with_sink = torch.logaddexp(lse_NT, sink_N.to(lse_NT.dtype)[:, None])
                    out_TND = (out_TND * torch.exp(lse_NT - lse_with_sink).T[..., None]).to(out_TND.dtype)
                    lse_NT = lse_with_sink
                outs.append(out_TND)
                lses.append(lse_NT)
        out_BTND, lse_BNT = _stack(outs), _stack(lses)
        ctx.save_for_backward(q_BTND, out_BTND, lse_BNT, sink_N)
        ctx.cell, ctx.store, ctx.backend, ctx.variant, ctx.block = cell, store, backend, variant, block
        return out_BTND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out_BTND: Tensor) -> tuple[Tensor | None, ...]:
        q_BTND, out_BTND, lse_BNT, sink_N = ctx.saved_tensors
        cell: Cell = ctx.cell
        store: KVStore = ctx.store
        dqs = []
        with without_autocast(q_BTND.device.type):
            for row, q_TND in enumerate(q_BTND):
                origin, spans = cell.visible(row, ctx.variant.window, ctx.block)
                with store.grads_from(cell.chunk, row, origin) as kv_grads:
                    keys_and_values = store.read(row, origin, cell.chunk.end)
                    dq_TND = ctx.backend.backward(
                        AttentionRow(q_TND, *keys_and_values, spans, ctx.variant),
                        RowGradient(grad_out_BTND[row], out_BTND[row], lse_BNT[row], kv_grads),
                    )
                dqs.append(dq_TND)
        own_grads = store.grads_of(cell.chunk)
        assert own_grads is not None
        dk_BTKD, dv_BTKD = (grad.to(q_BTND.dtype) for grad in own_grads)
        dsink_N = None
        if sink_N is not None and ctx.needs_input_grad[7]:
            out_dot_BNT = (grad_out_BTND.to(lse_BNT.dtype) * out_BTND).sum(-1).transpose(1, 2)
            share_BNT = torch.exp(sink_N.to(lse_BNT.dtype)[:, None] - lse_BNT)
            dsink_N = -(share_BNT * out_dot_BNT).sum((0, 2)).to(sink_N.dtype)
        return None, None, None, None, _stack(dqs), dk_BTKD, dv_BTKD, dsink_N


def _stack(rows: list[Tensor]) -> Tensor:
    return rows[0][None] if len(rows) == 1 else torch.stack(rows)
