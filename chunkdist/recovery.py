"""Out of memory in the middle of a step that other ranks take part in.

A rank that just stopped would leave the others waiting in a collective. Inside `recovering()` it computes
nothing more instead, but hands on tensors of the right shapes: weights are gathered and gradients reduced as
in any step, and nobody waits. What comes of such a step is of no use; who runs it throws it away, on all
ranks, and tries again (`chunkdist.train.trainers.shrinking`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


_TOLD_BY_LIBRARIES = (
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "cudaErrorMemoryAllocation",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",  # its handle takes memory when it is made, and tells nothing else
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
)
"""What is too little memory, too, outside of torch's allocator: kernels that are loaded when they first run,
and the libraries' own."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device has had too little memory, whoever asked for it."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _TOLD_BY_LIBRARIES)


@dataclass
class Recovery:
    """`error` is the first one; `None`: memory was enough."""

    error: RuntimeError | None = None


_running: Recovery | None = None
"""Not by thread: on a GPU, the backward runs in a thread of its own."""


@contextmanager
def recovering() -> Iterator[Recovery]:
    """Around one forward and backward."""
    global _running
    before, _running = _running, Recovery()
    try:
        yield _running
    finally:
        _running = before


def attempt(compute: Callable[[], T], instead: Callable[[], T]) -> T:
    """`compute()`; inside `recovering`, `instead()` from the first one on that finds too little memory.

    Raises:
        RuntimeError: the one of `compute`, if it is about something else, or outside of `recovering`.
    """
    recovery = _running
    if recovery is None:
        return compute()
    if recovery.error is None:
        try:
            return compute()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            recovery.error = error.with_traceback(None)  # whose frames hold tensors
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return instead()


def zeros(x: Tensor) -> Tensor:
    """Zeros of the shape of `x`, in the memory of one number."""
    return x.new_zeros(()).expand(x.shape)


def no_loss(*inputs: Tensor | None) -> Tensor:
    """A loss of 0, and gradients of 0, of tensors that a loss would have been computed from."""
    loss: Tensor = _NoLoss.apply(*inputs)  # type: ignore[no-untyped-call]
    return loss


class _NoLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Tensor | None) -> Tensor:
        ctx.save_for_backward(*inputs)
        some = next(x for x in inputs if x is not None)
        return some.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        return tuple(None if x is None else zeros(x) for x in ctx.saved_tensors)
