"""DeepSpeed ZeRO-3: a decoder layer is a leaf module, gathered and reduced once, however many chunks run.

ZeRO-3 reduces a leaf's gradients in a full backward hook, which runs only where an input of the leaf requires
grad: with frozen embeddings (LoRA) the first layer's does not, and is made to.

It releases a layer when its call ends, and a group of several layers runs inside the call of its last one. To
DeepSpeed, the weights of the others are external parameters of that one (`register_external_parameter`): it
gathers them for its call and for its backward.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
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
    """The decoder layers of a model, made ready for ZeRO-3, which may or may not come."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self._layers = tuple(layers)
        self._joined: list[tuple[nn.Module, nn.Parameter]] = []
        self._handles: list[RemovableHandle] = []
        for layer in layers:
            layer.__dict__[_LEAF] = True  # not by DeepSpeed's function: it may be imported later
        self._handles.append(layers[0].register_forward_pre_hook(_require_grad, prepend=True))

    def join(self, groups: Iterable[Sequence[nn.Module]]) -> None:
        """Before the first call of a layer: has the last layer of each group gather the weights of all."""
        if self._joined or not is_sharded(self._layers[0]):
            return
        from deepspeed.runtime.zero.partition_parameters import register_external_parameter

        for layers in groups:
            self._joined += [(layers[-1], p) for layer in layers[:-1] for p in layer.parameters()]
        for layer, parameter in self._joined:
            register_external_parameter(layer, parameter)

    def remove(self) -> None:
        if self._joined:
            from deepspeed.runtime.zero.partition_parameters import unregister_external_parameter

            for layer, parameter in self._joined:
                unregister_external_parameter(layer, parameter)
        self._joined = []
        for handle in self._handles:
            handle.remove()
        for layer in self._layers:
            layer.__dict__.pop(_LEAF, None)


def check_group(layers: Sequence[nn.Module]) -> None:
    """Raises where ZeRO-3 cannot run a group of decoder layers.

    Raises:
        ValueError: a layer was no leaf module when DeepSpeed took it.
    """
    if not is_sharded(layers[-1]):
        return
    if not all(hasattr(p, "ds_z3_leaf_module") for layer in layers for p in layer.parameters()):
        raise ValueError(
            f"{type(layers[0]).__name__} is no leaf module of DeepSpeed ZeRO-3, its weights would be "
            "gathered once a chunk: call chunk_model before deepspeed.initialize"
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
