"""The public calls: `chunk_model`, `unchunk_model`, `chunk_report`, and what trainers ask of a chunked
model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch.distributed import ProcessGroup
from transformers import PreTrainedModel

from chunkdist.config import ChunkConfig
from chunkdist.engine.chunked_model import HANDLE, ChunkedModel
from chunkdist.engine.layer import GroupLayer
from chunkdist.engine.sharing import sharing_rule
from chunkdist.loss.cross_entropy import tile_tokens
from chunkdist.loss.lazy_logits import tiled_head
from chunkdist.loss.token_losses import TokenLosses
from chunkdist.memory.auto import resolve_auto, resolve_keep
from chunkdist.memory.model_sizes import ModelSizes
from chunkdist.memory.sharded import SINGLE
from chunkdist.models.layers import causal_lm_of, find_layers, layer_states
from chunkdist.sharding.fsdp2 import device_of
from chunkdist.sharding.sequence import SequenceGroup
from chunkdist.spaco.sample import SampleReport
from chunkdist.stores.host_memory import HostMemory
from chunkdist.stream.layout import PrefixRule

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class ChunkReport:
    """How a model is chunked, for people to read.

    The attention fields name the backends and why they were taken; before the first step, what was set.
    """

    num_layers: int
    layers_per_group: int
    num_groups: int
    chunk_size: int
    retained_chunks: int
    reason: str
    """Why these values; those in the place of `"auto"` are provisional before the first step."""
    config: ChunkConfig
    """Without `"auto"`."""
    rebuilds_kv: bool
    keeps_attention: bool | Literal["global"]
    keep_reason: str
    """Why attention's outputs are kept, or not."""
    attention: str
    attention_reason: str
    head_tile_tokens: int | None
    sample: SampleReport | None
    """SpaCO's last sample."""


def chunk_model(model: Model, config: ChunkConfig, *, sequence_group: ProcessGroup | None = None) -> Model:
    """Makes a causal LM run its layers chunk by chunk, in place, with exact gradients.

    Chunked are the forwards without a cache: training, and evaluation under `no_grad`. Generation is the
    model's own. Gradients, state dict, and collectives of sharding engines are those of the model before.

    Args:
        model: A transformers causal LM, or a PEFT model of one; chunk before FSDP or DDP wrap it.
        sequence_group: Ranks that share the tokens of each row (sequence parallelism): each passes a
            contiguous, equal part of the same rows, in the order of the ranks, and gets the loss and the
            logits of its part. Gradients summed over the ranks are those of the rows. Of each chunk of
            `chunk_size` tokens, a rank runs an equal part.

    Returns:
        The same object.

    Raises:
        ValueError: the model is chunked already, wrapped, or its setting excludes chunks.
        UnsupportedModelError: gradients would not be exact. Some models show it only in their first forward.
    """
    is_shared = sequence_group is not None and sequence_group.size() > 1
    return _chunked(model, config, SequenceGroup(sequence_group) if is_shared else None)  # type: ignore[arg-type]


def share_rows(model: Model, config: ChunkConfig, sequence_group: ProcessGroup) -> Model:
    """`chunk_model` for trainers whose ranks share rows in training, and evaluate whole ones.

    Raises:
        ValueError, UnsupportedModelError: as `chunk_model`.
    """
    return _chunked(model, config, SequenceGroup(sequence_group, in_training_only=True))


def _chunked(model: Model, config: ChunkConfig, sequence: SequenceGroup | None) -> Model:
    causal_lm = _causal_lm(model)
    if HANDLE in causal_lm.__dict__:
        raise ValueError("the model is chunked already: call unchunk_model(model) first")
    ChunkedModel(causal_lm, config, resolve_auto_values, sequence)
    return model


def unchunk_model(model: Model) -> Model:
    """Takes back what `chunk_model` did, and leaves no trace. Returns the same object.

    Raises:
        ValueError: the model is not chunked.
    """
    causal_lm = _causal_lm(model)
    _handle(causal_lm).remove()
    return model


def chunk_report(model: nn.Module) -> ChunkReport:
    """What is chunked, and how.

    Raises:
        ValueError: the model is not chunked.
    """
    handle = _handle(_causal_lm(model))
    head = tiled_head(handle.model)
    reasons, config = handle.context.attention.reasons, handle.context.config
    return ChunkReport(
        num_layers=sum(len(group.layers) for group in handle.groups),
        layers_per_group=max(len(group.layers) for group in handle.groups),
        num_groups=len(handle.groups),
        chunk_size=int(config.chunk_size),
        retained_chunks=int(config.retained_chunks),
        reason=handle.context.reason or "auto: chosen in the first step",
        config=config,
        rebuilds_kv=config.rebuilds_kv,
        keeps_attention=config.keeps_attention,
        keep_reason=handle.context.keep_reason or "auto: chosen in the first step",
        attention=" and ".join(reasons) or config.attention,
        attention_reason="; ".join(reasons.values()) or "chosen in the first step",
        head_tile_tokens=None if head is None else tile_tokens(head.out_features, head.weight.element_size()),
        sample=None if handle.context.sample is None else handle.context.sample.report,
    )


def layers_of(model: nn.Module) -> list[GroupLayer]:
    """The decoder's layers, as they stand in their groups.

    Raises:
        ValueError: the model is not chunked.
    """
    return _handle(_causal_lm(model)).layers


def shared_prefixes(model: nn.Module, config: ChunkConfig) -> PrefixRule | None:
    """Which tokens that sequences of a training forward begin with in common are computed once; `None`: none
    are.

    Args:
        model: A causal LM, chunked or not, in any mode.

    Raises:
        ValueError: `share_prefixes=True`, and it would not be exact.
    """
    causal_lm = _causal_lm(model)
    entries, _, layers = find_layers(causal_lm)
    states = layer_states(causal_lm.config.get_text_config(), layers)
    has_state = any(state.relays for state in states)
    modes = {module: module.training for module in causal_lm.modules()}
    try:
        return sharing_rule(config.without_auto(), entries[-1].train(), has_state=has_state)
    finally:
        for module, mode in modes.items():
            module.training = mode


def num_computed(model: nn.Module) -> int:
    """Tokens that its training forwards so far have computed on this rank: without padding that was left out,
    shared ones once.

    Raises:
        ValueError: the model is not chunked.
    """
    return _handle(_causal_lm(model)).context.num_computed


def is_chunked(model: nn.Module) -> bool:
    """Whether `chunk_model` has been called for a causal LM, or a PEFT model of one."""
    return HANDLE in _causal_lm(model).__dict__


def observe_losses(model: nn.Module, observe: Callable[[TokenLosses], None]) -> Callable[[], None]:
    """From now on, `observe` gets the losses of the tokens of each forward with labels; not of those whose
    logits are made whole, by a head that is no plain linear map.

    Returns:
        Ends it.

    Raises:
        ValueError: the model is not chunked.
    """
    observers = _handle(_causal_lm(model)).observers
    observers.append(observe)
    return lambda: observers.remove(observe)


@contextmanager
def token_losses(model: nn.Module) -> Iterator[list[TokenLosses]]:
    """Inside, the losses of the tokens of each forward with labels, in their order, as `observe_losses` has
    them.

    Raises:
        ValueError: the model is not chunked.
    """
    found: list[TokenLosses] = []
    end = observe_losses(model, found.append)
    try:
        yield found
    finally:
        end()


def host_memory(model: nn.Module) -> HostMemory | None:
    """What holds the host memory of `offload="host"`; `None`: without it.

    Raises:
        ValueError: the model is not chunked.
    """
    return _handle(_causal_lm(model)).context.host


def resolve_auto_values(model: nn.Module, *, activation_bytes: int | None = None, **settings: Any) -> None:
    """Puts values in the place of each `"auto"` of the config; where there is none, does nothing. The first
    training forward does it by its own tokens, unless it has been done. `keep_attention` alone is asked for
    again where a longer row comes.

    Args:
        activation_bytes: As in `ModelSizes.of`.
        settings: What `resolve_auto` takes, of the longest row that will come.
    """
    context = (handle := _handle(_causal_lm(model))).context
    num_tokens = settings["num_tokens"] * settings.get("num_rows", 1)
    if context.reason and num_tokens > context.keep_decided_for:
        context.keep_decided_for = num_tokens

        def count() -> ModelSizes:
            return model_sizes(model, activation_bytes, settings.get("engine", SINGLE).weights_dtype)

        keeps, context.keep_reason = resolve_keep(model, context.config, count, **settings)
        context.resolve(replace(context.config, keep_attention=keeps), context.reason)
    if not context.reason:
        sizes = model_sizes(model, activation_bytes, settings.get("engine", SINGLE).weights_dtype)
        chosen, reason = resolve_auto(model, context.requested, sizes, **settings)
        handle.regroup(chosen.layers_per_group)
        context.resolve(chosen, reason)
        context.keep_reason, context.keep_decided_for = context.keep_reason or reason, math.inf


def reschedule(model: nn.Module, *, chunk_size: int, reason: str) -> None:
    """Other chunks, none of them retained, for the steps to come; attention's outputs are not kept, unless
    they were asked for.

    Args:
        reason: Why, for `ChunkReport`.
    """
    context = _handle(_causal_lm(model)).context
    chosen = replace(context.config, chunk_size=chunk_size, retained_chunks=0)
    if context.requested.keep_attention == "auto":
        chosen, context.keep_decided_for = replace(chosen, keep_attention=False), math.inf
        context.keep_reason = reason
    context.resolve(chosen, reason)


def model_sizes(
    model: nn.Module, activation_bytes: int | None = None, weights_dtype: torch.dtype | None = None
) -> ModelSizes:
    """What an estimate of a chunked model's memory follows from, for its own device; counted once.

    Raises:
        ValueError: the model is not chunked.
    """
    handle = _handle(_causal_lm(model))
    if (key := (activation_bytes, weights_dtype)) not in handle.sizes:
        handle.sizes[key] = ModelSizes.for_config(
            handle.model,
            handle.context.requested,
            activation_bytes=activation_bytes,
            weights_dtype=weights_dtype,
            device_type=device_of(handle.model).type,
        )
    sizes: ModelSizes = handle.sizes[key]
    return sizes


def _causal_lm(model: nn.Module) -> PreTrainedModel:
    inner = causal_lm_of(model)
    if not isinstance(inner, PreTrainedModel):
        raise ValueError(
            f"{type(inner).__name__} is not a transformers model: pass the model itself, before DDP, FSDP, "
            "DeepSpeed or torch.compile wrap it"
        )
    return inner


def _handle(model: PreTrainedModel) -> ChunkedModel:
    handle = model.__dict__.get(HANDLE)
    if not isinstance(handle, ChunkedModel):
        raise ValueError("the model is not chunked: call chunk_model(model, config) first")
    return handle
