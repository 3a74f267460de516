"""What the gradient check changes about a model for a while: each has an owner, and is put back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from peft import PeftModel
from torch import nn
from torch.distributed.tensor import DTensor

_QUANTISED = {"Params4bit", "Int8Params"}


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in evaluation mode (no dropout, which chunks would draw in other shapes) and has
    no gradients. Afterwards mode, gradients, buffers and random states are those of before."""
    modes = {module: module.training for module in model.modules()}
    grads = {parameter: parameter.grad for parameter in model.parameters()}
    buffers = {
        (module, name): (buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    }
    python_state = random.getstate()
    devices = sorted({p.device.index for p in grads if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices), torch.enable_grad():
            model.eval()
            for parameter in grads:
                parameter.grad = None
            yield
    finally:
        random.setstate(python_state)
        for parameter, grad in grads.items():
            parameter.grad = grad
        for (module, name), (buffer, content) in buffers.items():
            module._buffers[name] = buffer.copy_(content)
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def in_dtype(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Inside, narrower floating-point weights and buffers are in `dtype`, and autocast is off. Afterwards
    they are what they were, not what they would be after a conversion there and back."""
    tensors = [*model.parameters(), *model.buffers()]
    before = [(t, t.data) for t in tensors if t.is_floating_point() and t.dtype.itemsize < dtype.itemsize]
    device_type = next(model.parameters()).device.type
    try:
        for tensor, data in before:
            tensor.data = data.to(dtype)
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        for tensor, data in before:
            tensor.data = data


@contextmanager
def other_attention(model: nn.Module) -> Iterator[str | None]:
    """Inside, the plain model computes its attention in another way; gives the name of that, if any."""
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    configs = {id(m.config): m.config for m in inner.modules() if hasattr(m, "config")}.values()
    before = [(config, config._attn_implementation_internal) for config in configs if _has_attention(config)]
    name: str | None = "eager"
    if inner.config._attn_implementation == "eager":
        name = "sdpa" if inner._supports_sdpa else None
    try:
        for config, _ in before if name else ():
            config._attn_implementation_internal = name
        yield name
    finally:
        for config, implementation in before:
            config._attn_implementation_internal = implementation


def why_not_widened(model: nn.Module, dtype: torch.dtype) -> str | None:
    """Why a copy of the weights in `dtype` cannot be made, if so."""
    parameters = list(model.parameters())
    if getattr(model, "is_quantized", False) or any(type(p).__name__ in _QUANTISED for p in parameters):
        return "the weights are quantised"
    narrow = [p for p in parameters if p.is_floating_point() and p.dtype.itemsize < dtype.itemsize]
    needed = dtype.itemsize * sum(p.numel() * (2 if p.requires_grad else 1) for p in narrow)
    free = _free_bytes(parameters[0].device)
    if needed * 1.25 > free:
        return f"{needed / 2**30:.1f} GiB would be needed and {free / 2**30:.1f} are free"
    return None


def refuse_absent_weights(model: nn.Module) -> None:
    """Raises `RuntimeError` where the weights are sharded or elsewhere: the check runs the model by
    itself."""
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor) or hasattr(parameter, "ds_id"):
            raise RuntimeError(f"{name} is sharded, and the check needs it whole: run `chunkdist check`")
        if parameter.is_meta:
            raise RuntimeError(f"{name} is on the meta device: load the weights first")


def _has_attention(config: object) -> bool:
    return hasattr(config, "_attn_implementation_internal")


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    return int(psutil.virtual_memory().available)
