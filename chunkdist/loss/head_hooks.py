"""Hooks on the output layer that are no engine's own: they are promised the logits of the whole sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

ENGINES = ("deepspeed.", "torch.distributed.fsdp.", "torch.distributed._composable.")
"""Modules of hooks that gather, release and reduce weights around a call, whatever it returns."""
_OBSERVERS = ("torch.utils.module_tracker",)
_KINDS = ("forward_pre_hooks", "forward_hooks", "backward_pre_hooks", "backward_hooks")
"""`torch.nn.Module` has them as `_KIND`, torch.nn.modules.module as `_global_KIND` (torch 2.13)."""


def foreign_hook(modules: Iterable[nn.Module]) -> str | None:
    """The name of a hook on one of these, or on all modules, that is no engine's; `None`: there is none."""
    for module in modules:
        for kind in _KINDS:
            for hook in getattr(module, f"_{kind}").values():
                if not made_by(hook, ENGINES):
                    return _name(hook)
    for kind in _KINDS:
        for hook in getattr(torch_module, f"_global_{kind}").values():
            if not made_by(hook, (*ENGINES, *_OBSERVERS)):
                return _name(hook)
    return None


def made_by(hook: Callable[..., Any], packages: tuple[str, ...]) -> bool:
    """Whether a function, a bound method or an object comes from one of these packages."""
    hook = _innermost(hook)
    return str(getattr(hook, "__module__", "")).startswith(packages)


def _name(hook: Callable[..., Any]) -> str:
    hook = _innermost(hook)
    return str(getattr(hook, "__qualname__", type(hook).__name__))


def _innermost(hook: Any) -> Any:
    while isinstance(hook, partial):
        hook = hook.func
    return hook
