"""A cell that runs with a graph: retained from the forward, or rerun in the backward.

Layer groups, the stages of a pipeline, and the probe run their cells by these two functions, and differ in
what `run_layers` does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from chunkdist.engine.parameters import GroupParameters
from chunkdist.stores.state_relay import StateRelay


class CellOutput(NamedTuple):
    """What the layers of a cell come to.

    Args:
        hidden: The chunk's hidden states (B, T, H), at the group's output.
        relays: The caches of the layers that get their state through one.
        router_logits: As the routers have returned them for the chunk; empty where nobody wants them.
    """

    hidden: Tensor
    relays: list[StateRelay]
    router_logits: Sequence[Tensor] = ()


RunLayers = Callable[[], CellOutput]


@dataclass(frozen=True)
class CellGraph:
    """The graph of one cell: what goes in, what comes out, and how gradients go through it.

    Args:
        leaf: The chunk's hidden states (B, T, H), at the group's input; `None` for tokens.
    """

    leaf: Tensor | None
    output: CellOutput

    def backward(self, grad_hidden: Tensor, grads_router_logits: Sequence[Tensor] = ()) -> Tensor | None:
        """Adds to the gradients of parameters, prefix and states; returns that of the leaf, if it has one.

        Args:
            grad_hidden, grads_router_logits: Those of the outputs.
        """
        hidden, relays, router_logits = self.output
        outputs = [(hidden, grad_hidden), *zip(router_logits, grads_router_logits, strict=True)]
        roots = [(x, grad) for x, grad in outputs if x.requires_grad]
        roots += [end for relay in relays for end in relay.loose_ends()]
        if roots:
            tensors, grads = zip(*roots, strict=True)
            torch.autograd.backward(tensors, grads)
        for relay in relays:
            relay.hand_back()
        return None if self.leaf is None else self.leaf.grad


def rerun(leaf: Tensor | None, run_layers: RunLayers, parameters: GroupParameters) -> CellGraph:
    """The graph of a cell for the backward that runs now."""
    with torch.enable_grad(), parameters.aliased():
        return CellGraph(leaf, run_layers())


def retain(leaf: Tensor | None, run_layers: RunLayers, parameters: GroupParameters) -> CellGraph:
    """The graph of a cell for a backward to come: it holds no parameter's storage until then."""
    with parameters.saved_as_reference():
        return rerun(leaf, run_layers, parameters)
