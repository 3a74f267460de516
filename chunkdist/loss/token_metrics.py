"""What trainers ask of the tokens of a batch, computed while a tile's logits are there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class TokenFigures:
    """Sums over the tokens with a label, of one rank; on its device.

    Args:
        entropy: Entropy of the distributions, in nats.
        num_correct: Tokens that have the largest logit.
        loss: The cross-entropy alone, with its graph: a model may add other losses to it.
    """

    loss: Tensor | None = None
    entropy: Tensor | float = 0.0
    num_correct: Tensor | int = 0

    @torch.no_grad()
    def add(self, logits_NV: Tensor, labels_N: Tensor, ignore_index: int) -> None:
        """Adds the figures of one tile, in fp32."""
        has_label_N = labels_N != ignore_index
        logsumexp_N = logits_NV.logsumexp(-1)
        # In place: a tile has room for its logits, their gradient, and no third.
        probabilities_NV = (logits_NV - logsumexp_N[:, None]).exp_()
        mean_logit_N = torch.einsum("nv,nv->n", probabilities_NV, logits_NV)
        # Not by indexing with a mask, which waits for the device to learn how many there are.
        self.entropy = self.entropy + torch.where(has_label_N, logsumexp_N - mean_logit_N, 0).sum()
        self.num_correct = self.num_correct + ((logits_NV.argmax(-1) == labels_N) & has_label_N).sum()


_running: TokenFigures | None = None


@contextmanager
def token_figures() -> Iterator[TokenFigures]:
    """Inside, the tiled loss adds up the figures of its tokens."""
    global _running
    before, _running = _running, TokenFigures()
    try:
        yield _running
    finally:
        _running = before


def running_figures() -> TokenFigures | None:
    """`None`: nobody asks for them."""
    return _running
