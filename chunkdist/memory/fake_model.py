"""Models without storage, whose real code runs so that memory can be counted: one built new, or the twin of
one,
with the same modules and adapters and only its first layers."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedConfig

from chunkdist.models.flops import whole_shape
from chunkdist.models.layers import causal_lm_of, find_layers

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_OWN = ("forward", "_compiled_call_impl", "_loss_function")
"""Set on instances: by a chunked model, and by engines that wrap a call."""


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


def layer_kinds(model: Any) -> list[object]:
    """For each decoder layer what its memory depends on; layers with the same answer are alike."""
    layers = find_layers(model)[2]
    types = list(getattr(model.config.get_text_config(), "layer_types", None) or ())
    types = types if len(types) == len(layers) else [""] * len(layers)
    return [
        (
            type(layer),
            kind,
            tuple((n, whole_shape(p), p.dtype, p.requires_grad) for n, p in layer.named_parameters()),
        )
        for layer, kind in zip(layers, types, strict=True)
    ]


def twin_of(model: nn.Module, num_layers: int, dtype: torch.dtype | None = None) -> nn.Module:
    """The first `num_layers` decoder layers of `model`, and all around them, under a `FakeTensorMode`.

    Weights have the shapes that they have when gathered; quantised ones are in the dtype in which they are
    multiplied. Hooks, and the methods that `chunk_model` has replaced, stay behind. Those that are bound to a
    part of a layer (Liger's are) come along: what they keep for the backward is what the model keeps.

    Args:
        dtype: Dtype of the floating-point weights; `None`: as they are.
    """
    return _Twins(find_layers(causal_lm_of(model))[2], num_layers, dtype).of(model)


def loss_of(twin: Any, ids: Tensor) -> Tensor:
    """A causal LM's loss of all tokens, or of a reward model's scores, which its last layer makes of each."""
    if causal_lm_of(twin).get_output_embeddings() is not None:
        loss: Tensor = twin(input_ids=ids, labels=ids, use_cache=False).loss
        return loss
    scores: Tensor = twin(input_ids=ids, use_cache=False).logits
    return scores.float().sum()


class _Twins:
    def __init__(self, layers: list[nn.Module], num_layers: int, dtype: torch.dtype | None) -> None:
        self._dtype = dtype
        self._layers = [id(layer) for layer in layers]
        self._parts = {id(part) for layer in layers for part in layer.modules() if part is not layer}
        self._num_layers = num_layers
        self._made: dict[int, Any] = {}

    def of(self, module: nn.Module) -> nn.Module:
        if id(module) in self._made:
            twin: nn.Module = self._made[id(module)]
            return twin
        kind = next(base for base in type(module).__mro__ if not issubclass(base, FSDPModule))
        if any(hasattr(p, "quant_state") for p in module._parameters.values()):
            kind = nn.Linear
        twin = cast(nn.Module, kind.__new__(kind))
        self._made[id(module)] = twin
        state = {
            name: value
            for name, value in module.__dict__.items()
            if name not in _OWN and not name.startswith(("_chunkdist", "_z3", "_fsdp", "ds_"))
        }
        for name, value in state.items():
            if name in _HOOKS or name.endswith("_hooks") or "hooks_" in name:
                state[name] = type(value)() if isinstance(value, dict) else value
            elif isinstance(value, PreTrainedConfig):
                state[name] = self._configs(value)
            elif isinstance(value, nn.Module):
                state[name] = self.of(value)
        if "rope_type" in state:
            state["rope_type"] = _fixed(state["rope_type"])
        forward = module.__dict__.get("forward")
        if id(module) in self._parts and isinstance(forward, MethodType) and forward.__self__ is module:
            state["forward"] = MethodType(forward.__func__, twin)
        state["_parameters"] = {name: self._fake(p) for name, p in module._parameters.items()}
        state["_buffers"] = {name: self._fake(b) for name, b in module._buffers.items()}
        children = dict(module._modules)
        if [id(child) for child in children.values()] == self._layers:
            children = dict(list(children.items())[: self._num_layers])
        state["_modules"] = {name: None if c is None else self.of(c) for name, c in children.items()}
        twin.__dict__.update(state)
        return twin

    def _configs(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """A copy for so many layers."""
        twin: PreTrainedConfig = self._once(config, copy.deepcopy)
        text: Any = twin.get_text_config(decoder=True)
        self._made.setdefault(id(config.get_text_config(decoder=True)), text)
        text.__dict__["num_hidden_layers"] = self._num_layers  # not by `setattr`: kinds of layers are counted
        for part in (twin, text):
            part._experts_implementation = "batched_mm"  # others look at values
        return twin

    def _once(self, value: Any, make: Callable[[Any], Any]) -> Any:
        if id(value) not in self._made:
            self._made[id(value)] = make(value)
        return self._made[id(value)]

    def _fake(self, x: Tensor | None) -> Tensor | None:
        return None if x is None else self._once(x, self._make_fake)

    def _make_fake(self, x: Tensor) -> Tensor:
        dtype = getattr(getattr(x, "quant_state", None), "dtype", x.dtype)
        if isinstance(x, nn.Parameter) and dtype.is_floating_point:
            dtype = self._dtype or dtype
        return _fake(x, dtype)


def _fixed(rope_type: Any) -> Any:
    """A rotary module's kind, or one for each kind of layer, as one that looks at no numbers: frequencies of
    others follow the longest position (transformers 5.23, `dynamic_rope_update`)."""
    return dict.fromkeys(rope_type, "default") if isinstance(rope_type, dict) else "default"


def _fake(x: Tensor, dtype: torch.dtype) -> Tensor:
    empty = torch.empty(whole_shape(x), dtype=dtype, device="cpu")
    return nn.Parameter(empty, requires_grad=x.requires_grad) if isinstance(x, nn.Parameter) else empty
