"""A cell that runs with a graph: retained from the forward, or rerun in the backward.

Layer groups, the stages of a pipeline, and the probe run their cells by these two functions, and differ in
what `run_layers` does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from chunkdist.engine.parameters import GroupParameters
from chunkdist.stores.state_relay import StateRelay

RunLayers = Callable[[], tuple[Tensor, list[StateRelay]]]
"""Runs the layers of a cell: their output (B, T, H), and the caches of the layers that get their state
through
one."""


@dataclass(frozen=True)
class CellGraph:
    """The graph of one cell: what goes in, what comes out, and how gradients go through it.

    Args:
        leaf: The chunk's hidden states (B, T, H), at the group's input; `None` for tokens.
        output: The same at its output.
        relays: The caches of the layers that get their state through one.
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


def rerun(leaf: Tensor | None, run_layers: RunLayers, parameters: GroupParameters) -> CellGraph:
    """The graph of a cell for the backward that runs now."""
    with torch.enable_grad(), parameters.aliased():
        return CellGraph(leaf, *run_layers())


def retain(leaf: Tensor | None, run_layers: RunLayers, parameters: GroupParameters) -> CellGraph:
    """The graph of a cell for a backward to come: it holds no parameter's storage until then."""
    with parameters.saved_as_reference():
        return rerun(leaf, run_layers, parameters)
