"""Counts the tensors in which a row's logits would be, whoever makes them."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class RowLogits(TorchDispatchMode):
    """Counts tensors (..., V) of more than `num_tokens` tokens."""

    def __init__(self, vocab_size: int, num_tokens: int = 16) -> None:
        super().__init__()
        self.vocab_size, self.num_tokens, self.count = vocab_size, num_tokens, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            is_logits = isinstance(x, torch.Tensor) and x.ndim > 1 and x.shape[-1] == self.vocab_size
            limit = self.num_tokens * self.vocab_size * (x.element_size() if is_logits else 1)
            self.count += is_logits and min(x.nbytes, x.untyped_storage().nbytes()) > limit  # not expanded
        return result
