"""Models without storage: the real code runs, nothing is computed, and memory can be counted."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

Model = TypeVar("Model", bound=nn.Module)


def fake_model(build: Callable[[], Model], mode: FakeTensorMode, device: str = "cpu") -> Model:
    """What `build` returns, built on the meta device, with its parameters and buffers as fake tensors on
    `device`.

    Run it inside `mode`. (Built under `mode` itself, PEFT's casts fail: torch cannot swap fake parameters.)
    """
    with torch.device("meta"):
        model = build()
    fakes: dict[int, torch.Tensor] = {}
    with mode:
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    if id(parameter) not in fakes:  # tied parameters stay tied
                        empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                        fakes[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                    module._parameters[name] = fakes[id(parameter)]  # type: ignore[assignment]
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
    return model


@contextmanager
def without_triton_kernels() -> Iterator[None]:
    """Inside, a Triton kernel launched on fake tensors (Liger's, for instance) does nothing: it would read
    memory that is not there. What it writes to was allocated by its caller, so memory counts the same."""
    jit: Any = sys.modules.get("triton.runtime.jit")
    if jit is None:  # no kernel has been made
        yield
        return
    launcher_of = jit.KernelInterface.__getitem__

    def launcher(kernel: Any, grid: Any) -> Callable[..., Any]:
        def launch(*args: Any, **kwargs: Any) -> Any:
            if any(isinstance(x, FakeTensor) for x in (*args, *kwargs.values())):
                return None
            return launcher_of(kernel, grid)(*args, **kwargs)

        return launch

    jit.KernelInterface.__getitem__ = launcher
    try:
        yield
    finally:
        jit.KernelInterface.__getitem__ = launcher_of
