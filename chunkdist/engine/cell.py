"""The graph of one cell: what goes in, what comes out, and how gradients go through it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from chunkdist.stores.state_relay import StateRelay


@dataclass(frozen=True)
class CellGraph:
    """A cell that has run with a graph.

    Args:
        leaf: The chunk's hidden states (B, T, H), at the group's input; `None` for tokens.
        output: The same at its output.
        relays: Of the layers that get their state through one.
    """

    leaf: Tensor | None
    output: Tensor
    relays: list[StateRelay]

    def backward(self, grad_output: Tensor) -> Tensor | None:
        """Adds to the gradients of parameters, prefix and states; returns that of the leaf, if it has one."""
        roots = [(self.output, grad_output)] if self.output.requires_grad else []
        roots += [end for relay in self.relays for end in relay.loose_ends()]
        if roots:
            tensors, grads = zip(*roots, strict=True)
            torch.autograd.backward(tensors, grads)
        for relay in self.relays:
            relay.hand_back()
        return None if self.leaf is None else self.leaf.grad
