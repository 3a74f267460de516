"""What a rerun needs to compute the same as the first run: random number generators and autocast."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import get_device_states, set_device_states


@dataclass(frozen=True)
class RngState:
    """The states of the CPU's generator and of the device's on which a tensor lies."""

    cpu: Tensor
    devices: list[int]
    device_states: list[Tensor]
    device_type: str

    @classmethod
    def capture(cls, like: Tensor) -> RngState:
        devices, states = get_device_states(like)
        return cls(torch.get_rng_state(), devices, states, like.device.type)

    def equals(self, other: RngState) -> bool:
        """Whether no random number was drawn between the two."""
        mine, its = ([state.cpu, *state.device_states] for state in (self, other))
        return all(torch.equal(x, y) for x, y in zip(mine, its, strict=True))

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.devices:
            set_device_states(self.devices, self.device_states, device_type=self.device_type)


@contextmanager
def undisturbed_rng(like: Tensor) -> Iterator[None]:
    """Leaves the generators as they were, whatever runs inside."""
    state = RngState.capture(like)
    try:
        yield
    finally:
        state.restore()


@dataclass(frozen=True)
class AutocastState:
    """The autocast setting of one device type."""

    device_type: str
    enabled: bool
    dtype: torch.dtype

    @classmethod
    def capture(cls, device_type: str) -> AutocastState:
        enabled = torch.is_autocast_enabled(device_type)
        return cls(device_type, enabled, torch.get_autocast_dtype(device_type))

    def apply(self) -> AbstractContextManager[Any]:
        if not self.enabled:
            return without_autocast(self.device_type)
        return torch.autocast(self.device_type, enabled=True, dtype=self.dtype)

    def forget_casts(self) -> None:
        """Lets go of the narrow copies of weights, which autocast keeps until its outermost end."""
        if self.enabled:
            torch.clear_autocast_cache()


def no_leaf(leaf: Tensor) -> Tensor:
    """A leaf of a graph, under another name where autocast is on: it would keep the cast of a leaf, and the
    leaf with its gradient, until its outermost end, as if each chunk's hidden states were a weight."""
    is_kept = leaf.requires_grad and torch.is_autocast_enabled(leaf.device.type)
    return leaf.view_as(leaf) if is_kept else leaf


def refuse_second_derivatives() -> None:
    """To be called in the backward of a node, before `once_differentiable` switches gradients off.

    Raises:
        ValueError: gradients are to have a graph, which would go around this node without a word.
    """
    if torch.is_grad_enabled():
        raise ValueError(
            "create_graph=True: the gradients of a chunked model are computed without a graph, so a gradient "
            "penalty or a Hessian would lack them; leave it out, or call unchunk_model first"
        )


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Inside, autocast is off. Where it is already, nothing is done: cells enter this several times each, and
    a `torch.autocast` takes time to make, enter and leave."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
