"""What the gradient check changes about a model for a while: each has an owner, and is put back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from chunkdist.memory.auto import free_bytes
from chunkdist.precision import ieee_fp32

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
    """Inside, narrower floating-point weights and buffers are in `dtype`, autocast is off, and fp32 is not
    rounded to TF32. Afterwards they are what they were, not what they would be after a conversion there and
    back."""
    tensors = [*model.parameters(), *model.buffers()]
    before = [(t, t.data) for t in tensors if t.is_floating_point() and t.dtype.itemsize < dtype.itemsize]
    device_type = next(model.parameters()).device.type
    try:
        for tensor, data in before:
            tensor.data = data.to(dtype)
        with torch.autocast(device_type, enabled=False), ieee_fp32(), _eager_experts(model, dtype):
            yield
    finally:
        for tensor, data in before:
            tensor.data = data


@contextmanager
def _eager_experts(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Grouped matrix products know no fp64 (torch 2.13)."""
    name = "_experts_implementation_internal"
    modules: list[Any] = [module for module in model.modules() if dtype == torch.float64]
    configs = {id(module.config): module.config for module in modules if hasattr(module, "config")}
    before = [(config, getattr(config, name)) for config in configs.values() if getattr(config, name, None)]
    try:
        for config, _ in before:
            setattr(config, name, "eager")
        yield
    finally:
        for config, implementation in before:
            setattr(config, name, implementation)


@contextmanager
def nudged(model: Any, dtype: torch.dtype, seed: int) -> Iterator[None]:
    """Inside, each number that the input embeddings give is moved by one unit of rounding in `dtype`, up or
    down. Every operation after it rounds anew, so that a step's rounding error is drawn again."""
    generator = torch.Generator().manual_seed(seed)

    def nudge(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        signs = torch.randint(2, output.shape, generator=generator).to(output) * 2 - 1
        return output * (1 + torch.finfo(dtype).eps * signs)

    hook = model.get_input_embeddings().register_forward_hook(nudge)
    try:
        yield
    finally:
        hook.remove()


def why_not_widened(model: nn.Module, dtype: torch.dtype) -> str | None:
    """Why a copy of the weights in `dtype` cannot be made, if so."""
    parameters = list(model.parameters())
    if getattr(model, "is_quantized", False) or any(type(p).__name__ in _QUANTISED for p in parameters):
        return "the weights are quantised"
    narrow = [p for p in parameters if p.is_floating_point() and p.dtype.itemsize < dtype.itemsize]
    needed = dtype.itemsize * sum(p.numel() * (2 if p.requires_grad else 1) for p in narrow)
    free = free_bytes(parameters[0].device)
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
