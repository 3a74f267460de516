"""The trainable parameters of a group, seen from inside its node.

Inside, each parameter is replaced by an alias: another leaf over the same storage. So whatever watches the parameter
itself (hooks, DDP, FSDP2, ZeRO) sees one gradient per backward, however many chunks ran.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn


class GroupParameters:
    """The trainable parameters of some modules, their aliases, and the sums of the aliases' gradients."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._slots: list[tuple[nn.Module, str, nn.Parameter]] = []
        """Where a trainable parameter hangs; a tied one hangs in several places."""
        unique: dict[nn.Parameter, None] = {}
        for module in modules:
            for submodule in module.modules():
                for name, parameter in submodule._parameters.items():
                    if parameter is not None and parameter.requires_grad:
                        self._slots.append((submodule, name, parameter))
                        unique[parameter] = None
        self.trainable: tuple[nn.Parameter, ...] = tuple(unique)
        self._aliases: dict[nn.Parameter, nn.Parameter] = {}
        self._sums: dict[nn.Parameter, Tensor] = {}

    @contextmanager
    def aliased(self) -> Iterator[None]:
        """Puts the aliases in the places of the parameters."""
        if not self._aliases:
            self._aliases = {parameter: self._alias(parameter) for parameter in self.trainable}
        try:
            for module, name, parameter in self._slots:
                module._parameters[name] = self._aliases[parameter]
            yield
        finally:
            for module, name, parameter in self._slots:
                module._parameters[name] = parameter

    def take_grads(self) -> tuple[Tensor | None, ...]:
        """The gradients summed since the last call, in the order and the dtypes of `trainable`."""
        sums = {**{p: alias.grad for p, alias in self._aliases.items()}, **self._sums}
        self._aliases, self._sums = {}, {}
        return tuple(None if (grad := sums.get(p)) is None else grad.to(p.dtype) for p in self.trainable)

    def _alias(self, parameter: nn.Parameter) -> nn.Parameter:
        alias = nn.Parameter(parameter.detach())
        if parameter.dtype in (torch.bfloat16, torch.float16):
            alias.register_post_accumulate_grad_hook(partial(_add_in_fp32, self._sums, parameter))
        return alias


def _add_in_fp32(sums: dict[nn.Parameter, Tensor], parameter: nn.Parameter, alias: Tensor) -> None:
    grad, alias.grad = alias.grad, None
    assert grad is not None
    if parameter in sums:
        sums[parameter] += grad
    else:
        sums[parameter] = grad.float()
