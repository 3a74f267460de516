"""What a decoder passes to its layers: bound to names, checked, and cut to a chunk."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from chunkdist.errors import UnsupportedModelError
from chunkdist.stores.state_relay import CACHE_ARGUMENTS
from chunkdist.stream.stream import Chunk, Stream

_TOKEN_DIM = {"position_ids": -1, "cache_position": -1, "position_embeddings": -2, "attention_mask": -1}
"""The token dim of the arguments that all models have; for others it is the one dim as long as the stream."""

SEGMENT_ARGUMENTS = frozenset(("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"))
"""Where a stream's segments begin. Layers with state do not get them: their cells begin where segments do."""


class LayerSignature:
    """The names of a layer's arguments; the first is its hidden states."""

    def __init__(self, layer: nn.Module) -> None:
        self._signature = inspect.signature(layer.forward)
        self._hidden, *_ = self._signature.parameters
        by_kind = {parameter.kind: name for name, parameter in self._signature.parameters.items()}
        self.cache = next((name for name in CACHE_ARGUMENTS if name in self._signature.parameters), None)
        """The name of the layer's cache, if it takes one."""
        self._var_keyword = by_kind.get(inspect.Parameter.VAR_KEYWORD)

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """The hidden states, and the other arguments by name."""
        arguments = dict(self._signature.bind(*args, **kwargs).arguments)
        if self._var_keyword is not None:
            arguments |= arguments.pop(self._var_keyword, {})
        hidden = arguments.pop(self._hidden)
        if isinstance(hidden, tuple):  # `*args`, as PEFT's wrappers of whole modules have it
            hidden, *others = hidden
            if others:
                raise UnsupportedModelError(f"a wrapped layer gets {len(others)} arguments without names")
        return hidden, arguments


def refuse_arguments(layer: nn.Module, hidden: Tensor, arguments: dict[str, Any], stream: Stream) -> None:
    """Raises on what a layer cannot be given chunk by chunk."""
    name = type(layer).__name__
    num_rows = len(stream.segment_starts)
    if hidden.ndim != 3 or hidden.shape[:2] != (num_rows, stream.num_tokens):
        raise UnsupportedModelError(
            f"{name} gets hidden states of shape {tuple(hidden.shape)}, not ({num_rows} rows, "
            f"{stream.num_tokens} tokens, hidden) as the model's input"
        )
    for key, argument in arguments.items():
        if key in CACHE_ARGUMENTS and argument is not None:
            raise UnsupportedModelError(
                f"{name} gets a cache ({key}) from a decoder that was told not to make one"
            )
        if isinstance(argument, dict):
            raise UnsupportedModelError(
                f"{name} gets a dict ({key}), through which layers may pass on what is not chunked"
            )
        for tensor in _tensors(argument):
            if tensor.requires_grad and torch.is_grad_enabled():
                raise UnsupportedModelError(f"{name} gets an argument that carries a gradient: {key}")


def slice_tokens(arguments: dict[str, Any], chunk: Chunk, num_tokens: int) -> dict[str, Any]:
    """The arguments of one chunk: views of the tensors that have a token dim, the rest as it is."""
    if chunk.num_tokens == num_tokens:
        return arguments
    return {key: _slice(key, argument, chunk, num_tokens) for key, argument in arguments.items()}


def _slice(key: str, argument: Any, chunk: Chunk, num_tokens: int) -> Any:
    if isinstance(argument, (tuple, list)):
        return type(argument)(_slice(key, item, chunk, num_tokens) for item in argument)
    if not isinstance(argument, Tensor) or argument.ndim == 0:
        return argument
    if key in _TOKEN_DIM and argument.ndim >= -_TOKEN_DIM[key]:
        dim = _TOKEN_DIM[key]
        if argument.shape[dim] == 1:
            return argument
    else:
        dims = [dim for dim, size in enumerate(argument.shape) if size == num_tokens]
        if not dims:
            return argument
        if len(dims) > 1:
            raise UnsupportedModelError(
                f"layer argument {key} of shape {tuple(argument.shape)} has several dims of {num_tokens} "
                "tokens: cannot tell which one to cut"
            )
        (dim,) = dims
    return argument.narrow(dim, chunk.start, chunk.num_tokens)


def _tensors(argument: Any) -> list[Tensor]:
    if isinstance(argument, Tensor):
        return [argument]
    if isinstance(argument, dict):
        return [tensor for item in argument.values() for tensor in _tensors(item)]
    if isinstance(argument, (tuple, list)):
        return [tensor for item in argument for tensor in _tensors(item)]
    return []
