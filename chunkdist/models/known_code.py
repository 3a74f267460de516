"""Whose code runs inside a decoder layer: what is known to treat each token alone, and what has to be asked.

Known are the classes of the model's own package in transformers, the adapters of PEFT that have been compared
(0.21.2, tests/models/test_known_code.py), plain modules of torch, and the hooks and forwards of the packages
that run models. All else is the user's, and is asked (see `engine.additions`).
"""

from __future__ import annotations

import dis
from collections.abc import Callable, Iterator
from functools import partial
from types import CodeType, MethodType
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule

_PACKAGES = frozenset(
    (
        *("accelerate", "auto_gptq", "awq", "bitsandbytes", "chunkdist", "compressed_tensors"),
        *("deepspeed", "gptqmodel", "hqq", "liger_kernel", "optimum", "peft", "torch", "transformers"),
        "trl",
    )
)
"""Their hooks and forwards gather weights, move or cast tensors, or note; none looks at other tokens."""
_PEFT_METHODS = frozenset(
    (
        *("adalora", "adaption_prompt", "beft", "boft", "c3a", "deft", "delora", "fourierft", "frod"),
        *("glora", "gralora", "hira", "hra", "ia3", "ln_tuning", "loha", "lokr", "lora", "miss"),
        *("oft", "osf", "peanut", "psoft", "randlora", "road", "shira", "supertuning", "tinylora"),
        *("trainable_tokens", "unilora", "vblora", "vera", "waveft", "lycoris_utils", "tuners_utils"),
        "_buffer_dict",
    )
)
"""Modules of `peft.tuners`. Not among them: Lily (its router takes the mean over tokens), Poly, PVeRA (they
draw in each call), XLoRA, Shadow (layers pass on another object than hidden states)."""
_PEFT_EXCEPTIONS = frozenset(("peft.tuners.lora.monteclora",))
"""Weights are drawn in each call, and so once a chunk."""
_TORCH_CLASSES = frozenset(
    (
        *(nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm, nn.Identity, nn.Dropout, nn.ModuleList),
        *(nn.ModuleDict, nn.Sequential, nn.ParameterList, nn.ParameterDict, nn.ReLU, nn.ReLU6),
        *(nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.Tanh, nn.Softplus),
        *(nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh),
    )
)
_TORCH_MIXERS = frozenset(f"torch.nn.modules.{name}" for name in ("conv", "rnn", "padding"))


_WEIGHTS_OF_CALLS = "torch.nn.utils.spectral_norm"
"""A hook that is torch's, and makes another weight at each call in training (the old one; the parametrization
is a class of its own, and asked)."""


def is_known_class(kind: type[nn.Module], layer: nn.Module, *, mixes: bool) -> bool:
    """Whether a class, of a module inside of `layer` or of the layer itself, is known to treat each token
    alone, apart from what the engine sees (attention, and state in the layer's cache).

    Args:
        mixes: Whether the layer had convolutions when it was chunked: their state is in its cache.
    """
    if issubclass(kind, FSDPModule):  # a class of two, FSDP2's and the module's own (torch 2.13)
        kind = kind.__mro__[2]
    path = kind.__module__.split(".")
    if mixes and kind.__module__ in _TORCH_MIXERS:
        return True
    if kind in _TORCH_CLASSES or path[:2] in (["torch", "_dynamo"], ["torch", "distributed"]):
        return True
    if path[:2] == ["transformers", "models"]:
        return path[:3] == _package_of(layer)
    if path[:2] == ["peft", "tuners"]:
        return path[2] in _PEFT_METHODS and ".".join(path[:4]) not in _PEFT_EXCEPTIONS
    return path[0] in _PACKAGES - {"torch"}


def _package_of(layer: nn.Module) -> list[str]:
    """The package of the model that a layer, maybe wrapped, belongs to."""
    for module in layer.modules():
        for kind in type(module).__mro__:
            if kind.__module__.startswith("transformers.models."):
                return kind.__module__.split(".")[:3]
    return []


def is_known_function(function: Callable[..., Any]) -> bool:
    """Whether a hook, or a forward set on a module, is a known package's, and so is what it wraps."""
    packages = [_package(part) for part in _parts(function)]
    return all(package in _PACKAGES for package in packages) and not makes_weights(function)


def makes_weights(function: Callable[..., Any]) -> bool:
    """Whether a hook changes nothing that passes through it, but its module's weight, at each call."""
    return type(function).__module__ == _WEIGHTS_OF_CALLS


def has_branches(function: Callable[..., Any]) -> bool:
    """Whether a hook's code, or that of the functions it can be seen to call, does not always run as a
    whole."""
    waiting, seen = [function], set[int]()
    while waiting:
        whole = waiting.pop()
        owner = getattr(whole, "__self__", whole)
        for part in _parts(whole):
            code = getattr(part, "__code__", None)
            if code is None or id(code) in seen or _package(part) in _PACKAGES:
                continue
            seen.add(id(code))
            codes = [code, *(x for x in code.co_consts if isinstance(x, CodeType))]
            steps = [step.opname for own in codes for step in dis.get_instructions(own)]
            if any("_IF_" in name or name == "FOR_ITER" for name in steps):
                return True
            names = [name for own in codes for name in own.co_names]
            called = [cell.cell_contents for cell in part.__closure__ or () if _is_filled(cell)]
            called += [part.__globals__.get(name) for name in names]
            methods: list[Any] = [getattr(type(owner), name, None) for name in names]
            waiting += [x for x in called if callable(x)]
            waiting += [MethodType(x, owner) for x in methods if hasattr(x, "__code__")]
    return False


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def name_of(function: Callable[..., Any]) -> str:
    """A hook's name and where it is written, for a person."""
    parts = list(_parts(function))
    inner = next((part for part in parts if _package(part) not in _PACKAGES), parts[-1])
    code = getattr(inner, "__code__", None)
    where = "" if code is None else f" ({code.co_filename.rpartition('/')[2]}, line {code.co_firstlineno})"
    return getattr(inner, "__qualname__", type(inner).__name__).rpartition("<locals>.")[2] + where


def _parts(function: Any) -> Iterator[Any]:
    """A function, and those that it wraps: a decorator's module says nothing of what it was put on."""
    seen: set[int] = set()
    while function is not None and id(function) not in seen:
        seen.add(id(function))
        if isinstance(function, partial):
            function = function.func
            continue
        function = getattr(function, "__func__", function)
        if not hasattr(function, "__globals__"):
            call = getattr(type(function), "__call__", None)  # noqa: B004
            yield call if hasattr(call, "__globals__") else function
            return
        yield function
        function = getattr(function, "_torchdynamo_orig_callable", None) or getattr(
            function, "__wrapped__", None
        )


def _package(function: Any) -> str:
    names = getattr(function, "__globals__", None)
    path = type(function).__module__ if names is None else str(names.get("__name__", ""))
    return path.partition(".")[0]
