"""A layer group's one node in the autograd graph."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from chunkdist.recovery import attempt, zeros

if TYPE_CHECKING:
    from chunkdist.engine.group import GroupRun


def as_node(run: GroupRun, hidden: Tensor) -> Tensor:
    """What the group makes of `hidden`, (B, T, H) to (B, T, H)."""
    output: Tensor = _GroupNode.apply(run, hidden, *run.parameters.trainable)  # type: ignore[no-untyped-call]
    return output


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
    def forward(ctx: Any, run: GroupRun, hidden: Tensor, *parameters: Tensor) -> Tensor:
        ctx.run = run
        ctx.wants_grad = hidden.requires_grad

        def compute() -> tuple[Tensor, tuple[Tensor, ...]]:
            output = run.forward(hidden, run.group.context.retained_chunks(run.stream))
            return output, run.kept.leave_device(hidden)

        def instead() -> tuple[Tensor, tuple[Tensor, ...]]:
            run.drop()
            return hidden.detach(), ()

        output, saved = attempt(compute, instead)
        ctx.save_for_backward(*saved)
        return output.detach() if output._is_view() else output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        run: GroupRun = ctx.run

        def compute() -> tuple[Tensor | None, ...]:
            return run.backward(run.kept.come_back(ctx.saved_tensors), grad_output)

        def instead() -> tuple[Tensor | None, ...]:
            run.drop()
            run.units.gather()  # as the other ranks do
            return grad_output if ctx.wants_grad else None, *map(zeros, run.parameters.trainable)

        return None, *attempt(compute, instead)
