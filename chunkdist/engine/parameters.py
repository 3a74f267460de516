"""The trainable parameters of a group, seen from inside its node.

Inside, each parameter is replaced by an alias: another leaf over the same storage. So whatever watches the
parameter itself (hooks, DDP, FSDP2, ZeRO) sees one gradient per backward, however many chunks ran.

Between forward and backward, engines that shard weights release them. What is kept meanwhile, the graphs of
retained cells, holds on to no storage of a parameter, trained or frozen: it refers to the parameter, and
finds its storage of then.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

_NARROW = 64
"""Rows or columns up to which a matrix counts as small: an adapter's. The gradient of a small parameter may
wait for the others of its cell: its sum costs a launch more than memory."""


class GroupParameters:
    """The trainable parameters of some modules, their aliases, and the sums of the aliases' gradients."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._all: dict[nn.Parameter, None] = {}
        self._slots: list[tuple[nn.Module, str, nn.Parameter]] = []
        """Where a trainable parameter hangs; a tied one hangs in several places."""
        unique: dict[nn.Parameter, None] = {}
        for module in modules:
            for submodule in module.modules():
                for name, parameter in submodule._parameters.items():
                    if parameter is not None:
                        self._all[parameter] = None
                    if parameter is not None and parameter.requires_grad:
                        self._slots.append((submodule, name, parameter))
                        unique[parameter] = None
        self.trainable: tuple[nn.Parameter, ...] = tuple(unique)
        self._aliases: dict[nn.Parameter, nn.Parameter] = {}
        self._sums: dict[nn.Parameter, Tensor] = {}
        self._small: dict[nn.Parameter, Tensor] = {}
        """Gradients of small parameters from the cell at hand, which are added to the sums together."""

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

    @contextmanager
    def saved_as_reference(self) -> Iterator[None]:
        """Inside, graphs keep a parameter, or a view of one, by reference to the parameter."""
        by_storage: dict[int, list[nn.Parameter]] = {}
        for parameter in self._all:
            by_storage.setdefault(parameter.untyped_storage()._cdata, []).append(parameter)

        def pack(x: Tensor) -> Any:
            for parameter in by_storage.get(x.untyped_storage()._cdata, ()):
                offset = x.storage_offset() - parameter.storage_offset()
                if x.dtype == parameter.dtype and 0 <= offset < parameter.numel():
                    return parameter, x.size(), x.stride(), offset
            return x.detach()  # an output of the node that saves it would keep that node, and itself, alive

        def unpack(packed: Any) -> Tensor:
            if isinstance(packed, Tensor):
                return packed
            parameter, size, stride, offset = packed
            view: Tensor = parameter.detach().as_strided(size, stride, parameter.storage_offset() + offset)
            return view

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield

    def release(self) -> None:
        """Lets go of the parameters' storage until `restore`."""
        for alias in self._aliases.values():
            alias.data = alias.data.new_empty(0)

    def restore(self) -> None:
        """Takes the parameters' storage of now."""
        for parameter, alias in self._aliases.items():
            alias.data = parameter.data

    def take_grads(self, *, unused_as_zeros: bool = False) -> tuple[Tensor | None, ...]:
        """The gradients summed since the last call, in the order and the dtypes of `trainable`.

        Args:
            unused_as_zeros: What no chunk used is 0, not `None`: sharding engines wait for every parameter.
        """
        self.add_small()
        sums = {**{p: alias.grad for p, alias in self._aliases.items()}, **self._sums}
        self._aliases, self._sums = {}, {}
        if unused_as_zeros:
            sums |= {p: torch.zeros_like(p) for p in self.trainable if sums.get(p) is None}
        return tuple(None if (grad := sums.get(p)) is None else grad.to(p.dtype) for p in self.trainable)

    def _alias(self, parameter: nn.Parameter) -> nn.Parameter:
        alias = nn.Parameter(parameter.detach())
        if parameter.ndim < 2 or min(parameter.shape) <= _NARROW:
            alias.register_post_accumulate_grad_hook(partial(self._note_small, parameter))
        elif parameter.dtype in (torch.bfloat16, torch.float16):
            alias.register_post_accumulate_grad_hook(partial(_add_in_fp32, self._sums, parameter))
        return alias

    def _note_small(self, parameter: nn.Parameter, alias: Tensor) -> None:
        if parameter in self._small:  # of another cell
            self.add_small()
        grad, alias.grad = alias.grad, None
        assert grad is not None
        self._small[parameter] = grad

    def add_small(self) -> None:
        """When a cell has been backpropagated: one launch for many adapters and norms, not one each."""
        small, self._small = self._small, {}
        known = [p for p in small if p in self._sums]
        if known:
            torch._foreach_add_([self._sums[p] for p in known], [small[p] for p in known])
        narrow = (torch.bfloat16, torch.float16)
        for p in small.keys() - set(known):
            self._sums[p] = small[p].float() if p.dtype in narrow else small[p]


def _add_in_fp32(sums: dict[nn.Parameter, Tensor], parameter: nn.Parameter, alias: Tensor) -> None:
    grad, alias.grad = alias.grad, None
    assert grad is not None
    if parameter in sums:
        sums[parameter] += grad
    else:
        sums[parameter] = grad.float()
