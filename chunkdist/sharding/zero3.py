"""DeepSpeed ZeRO-3: a decoder layer is a leaf module, gathered and reduced once, however many chunks run.

ZeRO-3 reduces a leaf's gradients in a full backward hook, which runs only where an input of the leaf requires
grad: with frozen embeddings (LoRA) the first layer's does not, and is made to.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.integrations.deepspeed import (
    is_deepspeed_zero3_enabled,
    set_hf_deepspeed_config,
    unset_hf_deepspeed_config,
)

_LEAF = "_z3_leaf"
"""What `deepspeed.utils.set_z3_leaf_module` sets (0.19)."""


def is_sharded(module: nn.Module) -> bool:
    """Whether ZeRO-3 has taken the module's parameters."""
    return any(hasattr(parameter, "ds_id") for parameter in module.parameters())


@contextmanager
def whole_weights(hf_deepspeed_config: Any) -> Iterator[None]:
    """Inside, transformers draws a model's weights whole, as under other engines: ZeRO-3 would draw other
    ones, layer by layer. DeepSpeed cuts them when it takes the model.

    Args:
        hf_deepspeed_config: The training arguments' attribute; `None` without DeepSpeed.
    """
    if hf_deepspeed_config is None or not is_deepspeed_zero3_enabled():
        yield
        return
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(hf_deepspeed_config)


class Zero3Layers:
    """The decoder layers of a model, made ready for ZeRO-3, which may or may not come.

    Raises:
        ValueError: ZeRO-3 is on, and `layers_per_group` is not 1.
    """

    def __init__(self, layers: Sequence[nn.Module], layers_per_group: int) -> None:
        self._layers = tuple(layers)
        self.check_height(layers_per_group)
        self._handles: list[RemovableHandle] = []
        for layer in layers:
            layer.__dict__[_LEAF] = True  # not by DeepSpeed's function: it may be imported later
        self._handles.append(layers[0].register_forward_pre_hook(_require_grad, prepend=True))

    def check_height(self, layers_per_group: int) -> None:
        """Raises `ValueError` for groups of several layers under ZeRO-3."""
        if layers_per_group > 1 and (is_deepspeed_zero3_enabled() or is_sharded(self._layers[0])):
            _refuse_group(layers_per_group)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        for layer in self._layers:
            layer.__dict__.pop(_LEAF, None)


def check_group(layers: Sequence[nn.Module]) -> None:
    """Raises where ZeRO-3 cannot run a group of decoder layers.

    Raises:
        ValueError: the group has several layers, or its layer was no leaf module when DeepSpeed took it.
    """
    if not is_sharded(layers[-1]):
        return
    if len(layers) > 1:
        _refuse_group(len(layers))
    if not all(hasattr(parameter, "ds_z3_leaf_module") for parameter in layers[0].parameters()):
        raise ValueError(
            f"{type(layers[0]).__name__} is no leaf module of DeepSpeed ZeRO-3, its weights would be "
            "gathered once a chunk: call chunk_model before deepspeed.initialize"
        )


def _refuse_group(layers_per_group: int) -> None:
    raise ValueError(
        f"layers_per_group={layers_per_group} with DeepSpeed zero_optimization.stage=3, which releases a "
        "layer's weights when its call ends: write layers_per_group=1, or stage 2, or use FSDP2"
    )


def _require_grad(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    hidden = args[0] if args else None
    if (
        not isinstance(hidden, Tensor)
        or hidden.requires_grad
        or not torch.is_grad_enabled()
        or not is_sharded(layer)
    ):
        return None
    return hidden.detach().requires_grad_(), *args[1:]
