"""The chunk loop of the paper's own code (arXiv 2505.16710, `wenhaoli-xmu/seco`), as a baseline.

One group of all layers: a forward of all chunks without gradients that keeps their K and V, then, from the
last chunk to the first, each again with a graph and a `backward()` of its own. Every layer concatenates the
prefix's K and V in every chunk. The kernel is chunkdist's, the loss is the same tiled one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import DynamicCache

from chunkdist.attention import AttentionChoice
from chunkdist.attention.base import AttentionVariant, Span

KERNEL = "chunkdist_bench_kernel"
"""The attention implementation: the fastest backend of chunkdist, on K and V as they come."""

KeysAndValues = tuple[Tensor, Tensor]


class SpanKernel(torch.autograd.Function):
    """Causal attention of (1, N, T, D) over (1, K, S, D), within each span its last query aligned with its
    last key, by the fastest backend of chunkdist."""

    @staticmethod
    def forward(ctx: Any, scale: float, spans: tuple[Span, ...], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = [x[0].transpose(0, 1) for x in (q, k, v)]
        variant = AttentionVariant(scale=scale)
        backend = _CHOICE.backend_for(rows[0], variant)
        out_TND, lse_NT = backend.forward(rows[0], rows[1], rows[2], spans, variant)
        ctx.save_for_backward(*rows, out_TND, lse_NT)
        ctx.backend, ctx.spans, ctx.variant = backend, spans, variant
        return out_TND[None]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q_TND, k_SKD, v_SKD, out_TND, lse_NT = ctx.saved_tensors
        kv_grads = (
            k_SKD.new_zeros(k_SKD.shape, dtype=torch.promote_types(k_SKD.dtype, torch.float32)),
            v_SKD.new_zeros(v_SKD.shape, dtype=torch.promote_types(v_SKD.dtype, torch.float32)),
        )
        dq_TND = ctx.backend.backward(
            grad_out[0], q_TND, k_SKD, v_SKD, out_TND, lse_NT, kv_grads, ctx.spans, ctx.variant
        )
        dk, dv = (grad.to(k_SKD.dtype) for grad in kv_grads)
        return None, None, *(x.transpose(0, 1)[None] for x in (dq_TND, dk, dv))


_CHOICE = AttentionChoice("auto")


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    spans = (Span(0, query.shape[2], 0, key.shape[2]),)
    out: Tensor = SpanKernel.apply(scaling, spans, query, key, value)  # type: ignore[no-untyped-call]
    return out, None


def _no_mask(**kwargs: Any) -> None:
    return None


AttentionInterface.register(KERNEL, _attend)
AttentionMaskInterface.register(KERNEL, _no_mask)


class _Prefix(DynamicCache):
    """The K and V of the chunks before, by layer and chunk, and what the running chunk adds."""

    def __init__(self, parts: list[list[KeysAndValues]], num_layers: int) -> None:
        super().__init__()
        self._parts = parts
        self.own: list[KeysAndValues | None] = [None] * num_layers

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> KeysAndValues:
        self.own[layer_idx] = key_states, value_states
        before = [chunk[layer_idx] for chunk in self._parts]
        k = torch.cat([*(k for k, _ in before), key_states], dim=2)
        v = torch.cat([*(v for _, v in before), value_states], dim=2)
        return k, v

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return sum(chunk[layer_idx][0].shape[2] for chunk in self._parts)

    def of_chunk(self) -> list[KeysAndValues]:
        found = [kv for kv in self.own if kv is not None]
        assert len(found) == len(self.own), "a layer has not attended"
        return found


def paper_step(model: Any, ids: Tensor, chunk_size: int) -> Tensor:
    """One step: gradients are added to the parameters', the loss is returned, ().

    Args:
        model: Not chunked, without checkpointing, with attention `KERNEL`; inside `lazy_logits`.
        ids: (1, T).
    """
    labels = F.pad(ids, (0, 1), value=-100)[:, 1:]
    num_items = ids.shape[1] - 1
    num_layers = model.config.num_hidden_layers
    chunks = range(0, ids.shape[1], chunk_size)
    parts: list[list[KeysAndValues]] = []

    def run(start: int, prefix: _Prefix) -> Tensor:
        tokens = slice(start, min(start + chunk_size, ids.shape[1]))
        loss: Tensor = model(
            input_ids=ids[:, tokens],
            position_ids=torch.arange(tokens.start, tokens.stop, device=ids.device)[None],
            past_key_values=prefix,
            use_cache=True,
            labels=ids[:, tokens],
            shift_labels=labels[:, tokens],
            num_items_in_batch=num_items,
        ).loss
        return loss

    decoder = model.get_decoder()
    with torch.no_grad():
        for start in chunks:
            prefix = _Prefix(parts, num_layers)
            tokens = slice(start, min(start + chunk_size, ids.shape[1]))
            positions = torch.arange(tokens.start, tokens.stop, device=ids.device)[None]
            decoder(input_ids=ids[:, tokens], position_ids=positions, past_key_values=prefix, use_cache=True)
            parts.append([(k.detach(), v.detach()) for k, v in prefix.of_chunk()])
    for chunk in parts:
        for x in (x for kv in chunk for x in kv):
            x.requires_grad_()
    total = torch.zeros((), device=ids.device)
    for start in reversed(chunks):
        left = parts.pop()
        prefix = _Prefix(parts, num_layers)
        loss = run(start, prefix)
        pairs = [
            (own, leaf.grad)
            for own_kv, leaf_kv in zip(prefix.of_chunk(), left, strict=True)
            for own, leaf in zip(own_kv, leaf_kv, strict=True)
            if leaf.grad is not None and own.requires_grad
        ]
        torch.autograd.backward([loss, *(own for own, _ in pairs)], [None, *(grad for _, grad in pairs)])
        total += loss.detach()
    return total
