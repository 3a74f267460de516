"""What padding may carry: no labels.

Padded tokens are not computed, and have another token's hidden states (or, where rows stay rows, those of
tokens that see the padding before them). The plain model has something else there, which counts only if it
has a label, or a loss of the caller's own takes it: then a gradient arrives there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import Variable
from torch.nn import functional as F

_NO_LABEL = -100


class ForwardLabels:
    """The labels that a causal LM's forward was called with, for as long as it runs."""

    def __init__(self) -> None:
        self._labels: Tensor | None = None
        self._is_shifted = False
        self._ignored = _NO_LABEL
        self.mask: Tensor | None = None
        """(B, T), 0 where the decoder's tokens are padding; `None`: there is no padding."""

    @contextmanager
    def noted(self, names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
        """Args:
        names: The forward's parameters, in their order.
        """
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        shifted = given.get("shift_labels")
        labels = given.get("labels") if shifted is None else shifted
        before = self._labels, self._is_shifted, self._ignored
        self._labels = labels if isinstance(labels, Tensor) and labels.ndim == 2 else None
        self._is_shifted, self._ignored = shifted is not None, given.get("ignore_index", _NO_LABEL)
        try:
            yield
        finally:
            self._labels, self._is_shifted, self._ignored = before

    def on_padding(self, mask_BT: Tensor) -> Tensor:
        """A boolean: whether a padded token is to predict a label. Behind a sequence, a real one predicts
        the first padded token's label; before it, the last padded token predicts the first real one's."""
        labels = self._labels
        if labels is None or isinstance(labels, FakeTensor) or labels.shape[1] != mask_BT.shape[1]:
            return torch.zeros((), dtype=torch.bool, device=mask_BT.device)
        if not self._is_shifted:
            labels = F.pad(labels[:, 1:], (0, 1), value=self._ignored)
        return ((labels.to(mask_BT.device) != self._ignored) & (mask_BT == 0)).any()

    def watch(self, output: Any) -> None:
        """Refuses gradients of what a decoder has made of padding, at the end of their backward."""
        mask, self.mask = self.mask, None
        hidden = output[0] if isinstance(output, tuple) else getattr(output, "last_hidden_state", None)
        if mask is not None and isinstance(hidden, Tensor):
            refuse_gradients_of_padding(hidden, mask)

    def refuse(self) -> None:
        """Raises on labels of padding."""
        raise ValueError(
            "labels of padding (where attention_mask is 0), or of a row's first token behind left padding, "
            f"are not {self._ignored}: padding would predict them, and it is not computed; write "
            f"labels[attention_mask == 0] = {self._ignored}, and with left padding "
            f"labels[:, 1:][attention_mask[:, :-1] == 0] = {self._ignored}"
        )


def refuse_gradients_of_padding(x: Tensor, mask_BT: Tensor) -> None:
    """The backward through `x` will raise where a gradient of a padded token arrives.

    Args:
        x: (B, T, ...) or (B x T, ...), of all tokens.
    """
    if x.requires_grad:
        x.register_hook(partial(_refuse_gradients, mask_BT))


def _refuse_gradients(mask_BT: Tensor, grad: Tensor) -> None:
    """A hook of hidden states or router logits. A GPU is not waited for before all of the backward has been
    given to it."""
    largest = torch.linalg.vector_norm(grad, ord=torch.inf, dim=-1)  # and no copy of the gradient
    counts = largest > 0  # a loss that is NaN is none of padding
    found = (counts & (mask_BT == 0).to(grad.device).view(largest.shape)).any()

    def read() -> None:
        if bool(found):
            raise ValueError(
                "a loss takes hidden states or logits of padding (where attention_mask is 0), which is not "
                "computed, so they are not the plain model's; leave them out of the loss, with labels of "
                "-100 or a factor of 0"
            )

    Variable._execution_engine.queue_callback(read)  # torch 2.13
