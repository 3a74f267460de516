"""Steps and models for tests that compare two schedules to the bit."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from chunkdist.chunking import host_memory
from tests.helpers.models import batch, gradients, tiny_llama, with_lora


def dropping(model: Any) -> nn.Module:
    """With dropout in the MLPs."""
    for layer in model.model.layers:
        layer.mlp = nn.Sequential(layer.mlp, nn.Dropout(0.3))
    return model


def under_autocast(model: nn.Module) -> dict[str, Tensor]:
    with torch.autocast("cpu", torch.bfloat16):
        return gradients(model, batch())


def accumulated(model: nn.Module) -> dict[str, Tensor]:
    """Streams of other lengths, one after another."""
    for length in (37, 15, 60):
        model(**batch(num_tokens=length, seed=length), use_cache=False).loss.backward()
    return grads_of(model)


def two_forwards(model: nn.Module) -> dict[str, Tensor]:
    losses = [model(**batch(num_tokens=length), use_cache=False).loss for length in (37, 25)]
    sum(losses).backward()
    return grads_of(model)


def evaluated_between(model: nn.Module) -> dict[str, Tensor]:
    loss = model(**batch(), use_cache=False).loss
    used = (memory := host_memory(model)) and memory.used_bytes
    with torch.no_grad():
        model(**batch(seed=1), use_cache=False)
    assert used == (memory and memory.used_bytes), "an evaluation keeps nothing"
    loss.backward()
    return grads_of(model)


def without_backward(model: nn.Module) -> dict[str, Tensor]:
    gc.disable()  # what comes back must do so without a collection of cycles
    try:
        for _ in range(3):
            loss = model(**batch(), use_cache=False).loss
            memory = host_memory(model)
            held = memory and memory.held_bytes
            del loss
            assert not memory or memory.used_bytes == 0
    finally:
        gc.enable()
    found = gradients(model, batch())
    assert held == (memory and memory.held_bytes), "memory is used again"
    return found


def grads_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


BUILDS: dict[str, Callable[[], nn.Module]] = {
    "LoRA": lambda: with_lora(tiny_llama(num_layers=2)),
    "dropout": lambda: dropping(tiny_llama(num_layers=2)),
    "bf16": lambda: tiny_llama(num_layers=2, dtype=torch.bfloat16),
    "fp32": lambda: tiny_llama(num_layers=2, dtype=torch.float32),
}
