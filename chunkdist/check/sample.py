"""The short sample of the gradient check: a corner of the user's own batch, and the chunks to cut it into."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

CHECK_TOKENS = 512
_MIN_TOKENS = 5
_MAX_ROWS = 2
_NO_LABEL = -100


def check_chunk_size(num_tokens: int, chunk_size: int) -> int:
    """At most `chunk_size`, such that `num_tokens` are three full chunks or more, and a part of one."""
    size = min(chunk_size, max(1, 2 * num_tokens // 7))
    while size > 1 and num_tokens % size == 0:
        size -= 1
    return size


def short_sample(batch: Mapping[str, Any], *, max_tokens: int, device: torch.device) -> dict[str, Any]:
    """The first tokens of the first rows, at most `max_tokens` in all.

    Arguments that run along the tokens are cut with them, packed segments too. Without a label left, every
    token is predicted: the check is about gradients, and any loss will do.

    Raises:
        ValueError: fewer than 5 tokens a row, not enough for three chunks and a part of one.
    """
    ids = batch["input_ids"]
    num_rows = min(ids.shape[0], _MAX_ROWS)
    whole = ids.shape[1]
    num_tokens = min(whole, max(_MIN_TOKENS, max_tokens // num_rows))
    if num_tokens < _MIN_TOKENS:
        raise ValueError(
            f"the sample has {num_tokens} tokens, too few to be cut into chunks: take a longer one"
        )
    sample: dict[str, Any] = {}
    for name, value in batch.items():
        if name.startswith("max_length_") or name == "num_items_in_batch":
            continue
        if name.startswith("cu_seq_lens") and isinstance(value, Tensor):
            value = torch.unique(value.clamp(max=num_tokens)).to(value.dtype)
            sample[f"max_length_{name[-1]}"] = int(value.diff().max())
        elif isinstance(value, Tensor) and value.ndim >= 2 and value.shape[-1] == whole:
            value = value[..., :num_tokens]
            value = value[:num_rows] if value.shape[0] == ids.shape[0] else value
        sample[name] = value.to(device) if isinstance(value, Tensor) else value
    labels = sample.get("labels")
    if labels is not None and labels.ndim == 1:  # of scores
        return sample
    if labels is None or not bool((labels[:, 1:] != _NO_LABEL).any()):
        mask = sample.get("attention_mask")
        real = torch.ones_like(sample["input_ids"]) if mask is None else mask
        sample["labels"] = sample["input_ids"].masked_fill(real == 0, _NO_LABEL)
    return sample
