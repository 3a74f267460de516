"""Fused parts of a model's layers, to be timed beside its own: compiled by torch.compile, or Liger's kernels
(arXiv 2410.10989).

What is fused are the parts that treat each token alone and are bound by memory: norms, rotary embedding,
gated MLP. Attention is a kernel already, and the loss of all ways is tiled (`chunkdist.loss.cross_entropy`).
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, Literal, get_args

import torch
from torch import nn

from chunkdist.models.layers import causal_lm_of, find_layers

Kind = Literal["compile", "liger"]

_PATCHED = {"rope": True, "rms_norm": True, "swiglu": True, "cross_entropy": False}
_PATCHED |= {"fused_linear_cross_entropy": False}
"""What Liger is asked to replace. Its losses would take the place of the tiled one."""
_MAX_GRAPHS = 32
"""Of one part."""
_ABSENT = object()


@contextmanager
def fused(model: nn.Module, kind: Kind, *, backend: str | Callable[..., Any] = "inductor") -> Iterator[None]:
    """Inside, parts of the model run fused; after it, all is as it was before.

    `with fused(model, kind): chunk_model(model, config); step; unchunk_model(model)`.

    Args:
        model: A causal LM of transformers, or a PEFT model of one.
        kind: `compile`: the MLPs and norms of all layers; `liger`: those, the last norm, and the rotary
            embedding of every model of this class.
        backend: Of torch.compile.

    Raises:
        ValueError: no such kind, or the model has nothing that it could fuse.
        RuntimeError: Liger is not installed, or there is no GPU to run it.
    """
    causal_lm = causal_lm_of(model)
    if kind == "compile":
        with _compiled(causal_lm, backend):
            yield
    elif kind == "liger":
        with _with_liger(causal_lm):
            yield
    else:
        raise ValueError(f"kind={kind!r}: write one of {', '.join(get_args(Kind))}")


@contextmanager
def _compiled(causal_lm: Any, backend: str | Callable[..., Any]) -> Iterator[None]:
    parts = [part for layer in find_layers(causal_lm)[2] for part in _parts_of(layer)]
    if not parts:
        raise ValueError(
            f"{type(causal_lm).__name__} has no MLPs and norms in its layers: nothing to compile"
        )
    name = "_compiled_call_impl"  # what `nn.Module.compile` sets
    before = [part.__dict__.get(name, _ABSENT) for part in parts]
    # The norms of all layers share one code, which is compiled for each rank, stride and grad mode: for Qwen3
    # and chunks of one size 8 times, as often as torch allows. Not `torch._dynamo.config`: what is set there
    # is not seen by the thread that runs the backward. Needs no choice once torch 2.13 is the oldest.
    has_limit = "recompile_limit" in inspect.signature(torch.compile).parameters
    limit: dict[str, Any] = {"recompile_limit": _MAX_GRAPHS} if has_limit else {}
    torch._dynamo.reset()  # graphs of other runs count towards the limit
    try:
        for part in parts:
            # Tokens come in many numbers: full chunks, the last one, SpaCO's parts between kept chunks. A
            # graph for each would pass the limit, past which nothing is compiled. Hidden sizes are known from
            # the weights: only the number of tokens is left open.
            part.compile(backend=backend, dynamic=True, **limit)
        yield
    finally:
        for part, value in zip(parts, before, strict=True):
            _put_back(part.__dict__, name, value)
        torch._dynamo.reset()


def _parts_of(module: nn.Module) -> list[nn.Module]:
    """MLPs and norms, the outermost of each."""
    found = []
    for name, child in module.named_children():
        kind = type(child).__name__.lower()
        is_part = "norm" in kind or name in ("mlp", "feed_forward") or kind.endswith("mlp")
        found += [child] if is_part else _parts_of(child)
    return found


@contextmanager
def _with_liger(causal_lm: Any) -> Iterator[None]:
    liger = _liger()
    model_type = causal_lm.config.model_type
    if model_type not in liger.MODEL_TYPE_TO_APPLY_LIGER_FN:
        known = ", ".join(sorted(liger.MODEL_TYPE_TO_APPLY_LIGER_FN))
        raise ValueError(f"Liger has no kernels for model_type={model_type!r}: it has them for {known}")
    parameter = next(causal_lm.parameters())
    if parameter.dtype == torch.float64:
        raise ValueError("the model is in float64, which Liger's kernels do not take: write model.float()")
    if parameter.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("the model is on the CPU, where Liger's kernels do not run: move it to a GPU")
    owners = [module.__dict__ for module in causal_lm.modules()]
    owners += [vars(module) for module in _modules_of_transformers()]
    before = [dict(owner) for owner in owners]
    try:
        liger._apply_liger_kernel_to_instance(model=causal_lm, **_PATCHED)
        changes = _changes(owners, before)
    except BaseException:
        _undo(_changes(owners, before))
        raise
    try:
        yield
    finally:
        _undo(changes)


def _liger() -> Any:
    """The module of Liger that patches models."""
    try:
        return import_module("liger_kernel.transformers.monkey_patch")
    except ImportError as error:
        raise RuntimeError(
            f"Liger's kernels cannot be imported ({error}): pip install liger-kernel, and triton where torch "
            "has come without it"
        ) from error


def _modules_of_transformers() -> list[Any]:
    """Those with models, and torch.nn, whose names Liger replaces."""
    return [nn, *(module for name, module in sys.modules.items() if name.startswith("transformers.models."))]


def _changes(
    owners: list[dict[str, Any]], before: list[dict[str, Any]]
) -> list[tuple[dict[str, Any], str, Any]]:
    """What has another value than before: where, its name, and the value before."""
    return [
        (owner, name, known.get(name, _ABSENT))
        for owner, known in zip(owners, before, strict=True)
        for name in owner.keys() | known.keys()
        if owner.get(name, _ABSENT) is not known.get(name, _ABSENT)
    ]


def _undo(changes: list[tuple[dict[str, Any], str, Any]]) -> None:
    for owner, name, value in changes:
        _put_back(owner, name, value)


def _put_back(owner: dict[str, Any], name: str, value: Any) -> None:
    if value is _ABSENT:
        owner.pop(name, None)
    else:
        owner[name] = value
