"""A layer group's one node in the autograd graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from chunkdist.engine.parameters import GroupParameters
from chunkdist.recovery import attempt, zeros
from chunkdist.replay import refuse_second_derivatives


class NodeWork(Protocol):
    """What a group computes inside its node, and how it gives up where memory is not enough."""

    parameters: GroupParameters

    def forward_and_save(self, hidden: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The outputs, hidden states (B, T, H) first, and what autograd is to keep for the backward."""
        ...

    def backward_from(
        self, saved: Sequence[Tensor], grad_outputs: Sequence[Tensor]
    ) -> tuple[Tensor | None, ...]:
        """Gradients of the hidden states and of each trainable parameter."""
        ...

    def without_memory(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """Outputs of the right shapes."""
        ...

    def give_up(self) -> None:
        """Lets go of what was saved for the backward."""
        ...

    def give_up_backward(self) -> None:
        """Lets go likewise, and takes part in the collectives that the backward begins with."""
        ...


def as_node(work: NodeWork, hidden: Tensor) -> tuple[Tensor, ...]:
    """What the group makes of `hidden` (B, T, H): the same, and the router logits of its layers."""
    outputs: tuple[Tensor, ...] = _GroupNode.apply(work, hidden, *work.parameters.trainable)  # type: ignore[no-untyped-call]
    return outputs


def passed_on(hidden: Tensor) -> Tensor:
    """`hidden`, as a layer returns it that leaves the work to the last one of its group.

    FSDP2 gives a layer a view of its input, and hangs its hook on what the layer returns: were that the
    view, an operation on it in place would drop the hook.
    """
    if not (torch.is_grad_enabled() and hidden.requires_grad and hidden._is_view()):
        return hidden
    result: Tensor = _NoView.apply(hidden)  # type: ignore[no-untyped-call]
    return result


class _NoView(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        return hidden.detach()  # the same storage and count of changes, and no view to autograd

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        return grad_output


class _GroupNode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, work: NodeWork, hidden: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.work = work
        ctx.wants_grad = hidden.requires_grad

        def instead() -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
            work.give_up()
            return work.without_memory(hidden.detach()), ()

        outputs, saved = attempt(lambda: work.forward_and_save(hidden), instead)
        ctx.save_for_backward(*saved)
        return tuple(output.detach() if output._is_view() else output for output in outputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives()
        work: NodeWork = ctx.work

        def instead() -> tuple[Tensor | None, ...]:
            work.give_up_backward()
            return grad_outputs[0] if ctx.wants_grad else None, *map(zeros, work.parameters.trainable)

        return None, *attempt(lambda: work.backward_from(ctx.saved_tensors, grad_outputs), instead)
