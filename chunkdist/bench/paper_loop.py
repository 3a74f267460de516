"""The chunk loop of the paper's own code (arXiv 2505.16710, `wenhaoli-xmu/seco`), as a baseline.

One group of all layers: a forward of all chunks without gradients that keeps their K and V, then, from the
last chunk to the first, each again with a graph and a `backward()` of its own. Every layer concatenates the
prefix's K and V in every chunk. The kernel is chunkdist's, the loss is the same tiled one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import DynamicCache

KeysAndValues = tuple[Tensor, Tensor]


class _Prefix(DynamicCache):
    """The K and V of the chunks before, by chunk and layer, and what the running chunk adds, by layer."""

    def __init__(self, parts: list[list[KeysAndValues]]) -> None:
        super().__init__()
        self._parts = parts
        self.own: dict[int, KeysAndValues] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> KeysAndValues:
        self.own[layer_idx] = key_states, value_states
        pairs = [*(chunk[layer_idx] for chunk in self._parts), self.own[layer_idx]]
        return torch.cat([k for k, _ in pairs], dim=2), torch.cat([v for _, v in pairs], dim=2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return sum(chunk[layer_idx][0].shape[2] for chunk in self._parts)


def paper_step(model: Any, ids: Tensor, chunk_size: int) -> Tensor:
    """One step: gradients are added to the parameters', the loss is returned, ().

    Args:
        model: Not chunked, without checkpointing, with attention `kernels.PREFIX`; inside `lazy_logits`.
        ids: (1, T).
    """
    labels = F.pad(ids, (0, 1), value=-100)[:, 1:]
    chunks = [slice(start, start + chunk_size) for start in range(0, ids.shape[1], chunk_size)]
    parts: list[list[KeysAndValues]] = []

    def inputs(tokens: slice, prefix: _Prefix) -> dict[str, Any]:
        positions = torch.arange(ids.shape[1], device=ids.device)[None, tokens]
        cache = {"past_key_values": prefix, "use_cache": True}
        return {"input_ids": ids[:, tokens], "position_ids": positions, **cache}

    with torch.no_grad():
        for tokens in chunks:
            prefix = _Prefix(parts)
            model.get_decoder()(**inputs(tokens, prefix))
            parts.append([(k.detach(), v.detach()) for _, (k, v) in sorted(prefix.own.items())])
    for x in (x for chunk in parts for kv in chunk for x in kv):
        x.requires_grad_()
    total = torch.zeros((), device=ids.device)
    for tokens in reversed(chunks):
        left = parts.pop()
        prefix = _Prefix(parts)
        loss: Tensor = model(
            **inputs(tokens, prefix),
            labels=ids[:, tokens],
            shift_labels=labels[:, tokens],
            num_items_in_batch=ids.shape[1] - 1,
        ).loss
        pairs = [
            (own, leaf.grad)
            for layer, leaf_kv in enumerate(left)
            for own, leaf in zip(prefix.own[layer], leaf_kv, strict=True)
            if leaf.grad is not None and own.requires_grad
        ]
        torch.autograd.backward([loss, *(own for own, _ in pairs)], [None, *(grad for _, grad in pairs)])
        total += loss.detach()
    return total
