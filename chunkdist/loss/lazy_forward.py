"""What the lazy logits of one forward share, and the place in the graph where a gradient must not arrive."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from chunkdist.loss.weight_witness import WeightWitness

INSTEAD = "write outputs.logits.clone() there, or call the model without labels"


class _Observed:
    """Whether somebody waits for a gradient of the logits, which the loss does not go through."""

    name = ""

    def refuse(self, grad_loss: Tensor) -> None:
        """A hook of the loss."""
        if self.name:
            raise RuntimeError(
                f"outputs.logits.{self.name}, and backward of outputs.loss: a chunked model computes this "
                "loss without the logits, so they get no gradient of it; call the model without labels and "
                "compute the loss from outputs.logits"
            )


class LazyForward:
    """What the lazy logits of one forward share.

    Args:
        outer: What the model calls as its output layer: the head, or PEFT's wrapper around it.
    """

    def __init__(self, outer: nn.Module) -> None:
        self.outer = outer
        self.is_running = True
        self.observed = _Observed()
        self.witness: WeightWitness | None = None


class Unreachable(torch.autograd.Function):
    """The node of logits that are not made: whoever sends a gradient here has not seen the real ones."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, make: Callable[[], Tensor]) -> Tensor:
        return make()

    @staticmethod
    def backward(ctx: Any, grad_logits: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "outputs.logits of a chunked model were given as they are to a function that torch cannot see "
            f"into, and their gradient would be lost: {INSTEAD}"
        )


UNREACHABLE_NODE: Any = Unreachable._backward_cls
