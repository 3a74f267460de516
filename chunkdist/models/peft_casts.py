"""LoRA layers of PEFT cast their input to the adapter's dtype, fp32 as a rule. Under autocast the product
that follows casts it back, so each adapter makes two copies of the hidden states that change nothing.

Inside of chunked layers these casts are left out where the bits are the same: autocast is on, the input is in
its dtype, and nothing but the product reads it (no dropout, no variant such as DoRA).
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn

CAST = "_cast_input_dtype"
"""PEFT's method that casts (0.18 to 0.21)."""


def leave_out_casts(layer: nn.Module) -> list[nn.Module]:
    """Sets the method on the instances of a layer's adapters. Returns these, for `put_back_casts`."""
    changed: list[nn.Module] = []
    for module in layer.modules():
        if type(module) is Linear and CAST not in module.__dict__:
            module.__dict__[CAST] = MethodType(_cast, module)
            changed.append(module)
    return changed


def put_back_casts(modules: list[nn.Module]) -> None:
    """As they were."""
    for module in modules:
        module.__dict__.pop(CAST, None)


def _cast(module: Any, x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if x is not None and _is_cast_back(module, x):
        return x
    result: Tensor | None = getattr(type(module), CAST)(module, x, dtype)
    return result


def _is_cast_back(module: Any, x: Tensor) -> bool:
    kind = x.device.type
    return (
        torch.is_autocast_enabled(kind)
        and x.dtype == torch.get_autocast_dtype(kind)
        and not module.lora_variant
        and all(isinstance(dropout, nn.Identity) for dropout in module.lora_dropout.values())
    )
