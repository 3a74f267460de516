"""`chunk_model`: finds a model's decoder layers, forms groups, and puts the chunked forward in their place.

No code for any particular model: layers are the elements of the decoder's one list of layers, their attention
is whatever calls transformers' `AttentionInterface`. What cannot be computed exactly is refused.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any, NoReturn, SupportsIndex, TypeVar

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from chunkdist.attention.function import ATTENTION_NAME, LAYER_ATTRIBUTE, attend
from chunkdist.attention.mask import chunk_mask
from chunkdist.config import ChunkConfig
from chunkdist.engine.as_run import refuse_offset_adapters
from chunkdist.engine.context import ChunkContext
from chunkdist.engine.group import LayerGroup
from chunkdist.engine.layer import GroupLayer
from chunkdist.engine.method import method_like
from chunkdist.engine.neftune import noise_by_segment
from chunkdist.engine.probe import LayerProbe, needs_probe
from chunkdist.loss.cross_entropy import tile_tokens
from chunkdist.loss.lazy_logits import lazy_logits, tiled_head, untiled_reason
from chunkdist.memory.auto import resolve_auto
from chunkdist.memory.model_sizes import ModelSizes
from chunkdist.memory.sharded import SINGLE
from chunkdist.models.known_code import is_known_class
from chunkdist.models.layers import causal_lm_of, configs_of, find_layers, layer_states, refuse_known
from chunkdist.sharding.sequence import refuse_sequence_parallelism
from chunkdist.sharding.zero3 import Zero3Layers
from chunkdist.spaco.sample import SampleReport
from chunkdist.stores.host_memory import HostMemory

logger = logging.getLogger(__name__)

_HANDLE = "_chunkdist_model"
_CONTEXT = "_chunkdist_context"
_ORIGINAL_FORWARD = "_chunkdist_original_forward"

Model = TypeVar("Model", bound=nn.Module)

AttentionInterface.register(ATTENTION_NAME, attend)
AttentionMaskInterface.register(ATTENTION_NAME, chunk_mask)


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
    attention: str
    attention_reason: str
    head_tile_tokens: int | None
    sample: SampleReport | None
    """SpaCO's last sample."""


def chunk_model(model: Model, config: ChunkConfig) -> Model:
    """Makes a causal LM run its layers chunk by chunk, in place, with exact gradients.

    Chunked are the forwards without a cache: training, and evaluation under `no_grad`. Generation is the
    model's own. Gradients, state dict, and collectives of sharding engines are those of the model before.

    Args:
        model: A transformers causal LM, or a PEFT model of one; chunk before FSDP or DDP wrap it.

    Returns:
        The same object.

    Raises:
        ValueError: the model is chunked already, wrapped, or its setting excludes chunks.
        UnsupportedModelError: gradients would not be exact. Some models show it only in their first forward.
    """
    causal_lm = _causal_lm(model)
    if _HANDLE in causal_lm.__dict__:
        raise ValueError("the model is chunked already: call unchunk_model(model) first")
    causal_lm.__dict__[_HANDLE] = ChunkedModel(causal_lm, config)
    return model


def unchunk_model(model: Model) -> Model:
    """Takes back what `chunk_model` did, and leaves no trace. Returns the same object.

    Raises:
        ValueError: the model is not chunked.
    """
    causal_lm = _causal_lm(model)
    _handle(causal_lm).remove()
    del causal_lm.__dict__[_HANDLE]
    return model


def chunk_report(model: nn.Module) -> ChunkReport:
    """What is chunked, and how.

    Raises:
        ValueError: the model is not chunked.
    """
    return _handle(_causal_lm(model)).report()


def layers_of(model: nn.Module) -> list[GroupLayer]:
    """The decoder's layers, as they stand in their groups.

    Raises:
        ValueError: the model is not chunked.
    """
    return [layer for group in _handle(_causal_lm(model)).groups for layer in group.layers]


def host_memory(model: nn.Module) -> HostMemory | None:
    """What holds the host memory of `offload="host"`; `None`: without it.

    Raises:
        ValueError: the model is not chunked.
    """
    return _handle(_causal_lm(model)).context.host


def resolve_auto_values(model: nn.Module, *, activation_bytes: int | None = None, **settings: Any) -> None:
    """Puts values in the place of each `"auto"` of the config; where there is none, does nothing. The first
    training forward does it by its own tokens, unless it has been done.

    Args:
        activation_bytes: As in `ModelSizes.of`.
        settings: What `resolve_auto` takes, of the longest row that will come.
    """
    context = (handle := _handle(_causal_lm(model))).context
    if not context.reason:
        sizes = handle.sizes(activation_bytes, settings.get("engine", SINGLE).weights_dtype)
        chosen, reason = resolve_auto(model, context.asked, sizes, **settings)
        handle.regroup(chosen.layers_per_group)
        context.resolve(chosen, reason)


def model_sizes(
    model: nn.Module, activation_bytes: int | None = None, weights_dtype: torch.dtype | None = None
) -> ModelSizes:
    """What an estimate of a chunked model's memory follows from, for its own device; counted once.

    Raises:
        ValueError: the model is not chunked.
    """
    return _handle(_causal_lm(model)).sizes(activation_bytes, weights_dtype)


class ChunkedModel:
    """Everything that `chunk_model` puts into a model."""

    def __init__(self, model: PreTrainedModel, config: ChunkConfig) -> None:
        entries, decoder, layers = find_layers(model)
        refuse_sequence_parallelism(configs_of([*entries, decoder, *layers]), [model])
        refuse_known(model, entries[-1], layers)
        refuse_offset_adapters([module for layer in layers for module in layer.modules()])
        num_layers = len(layers)
        height = self._height(config.without_auto().layers_per_group, num_layers)
        self.model = model
        self.entries = entries
        self._states = layer_states(model.config.get_text_config(), layers)
        relays = any(state.relays for state in self._states)
        if relays and config.sampler is not None:
            raise ValueError(
                f"sampler={config.sampler!r}, but {type(model).__name__} has layers with state between "
                "tokens: a dropped chunk cuts the chain of states, and weights for it grow with every "
                "chunk; write sampler=None"
            )
        probe = LayerProbe() if needs_probe(model, has_state=relays) else None
        configs = configs_of([*entries, decoder, *layers])
        self.context = ChunkContext(config, configs, has_state=relays, probe=probe)
        self._zero3 = Zero3Layers(layers, height)
        self.groups: list[LayerGroup] = []
        self._sizes: dict[tuple[int | None, torch.dtype | None], ModelSizes] = {}
        self._forwards: list[tuple[nn.Module, Any, Any]] = []
        for start in range(0, num_layers, height):
            self.groups.append(self._group(layers[start : start + height], start))
        self._number_groups()
        if tiled_head(model) is None:
            logger.warning(
                "chunkdist: the logits of the whole sequence will be made: %s", untiled_reason(model)
            )
        for name, module in decoder.named_children():
            is_own = type(module).__module__ == type(decoder).__module__
            is_norm = "norm" in type(module).__name__.lower() or "norm" in name.lower()
            if is_norm and (is_own or is_known_class(type(module), layers[0], mixes=False)):
                self._group([module], None)
        for entry in entries:
            entry.__dict__[_CONTEXT] = self.context
            self._replace_forward(entry, _method(_decoder_forward, entry))
        self._replace_forward(model, _method(_causal_lm_forward, model))

    def remove(self) -> None:
        """Puts the forwards back; where others have wrapped ours, ours only passes on from now."""
        self.context.bypassed = True
        if self.context.host is not None:
            self.context.host.close()
        self._zero3.remove()
        for entry in self.entries:
            entry.__dict__.pop(_CONTEXT)
        for module, forward, before in self._forwards:
            if module.__dict__.get("forward") != forward:
                continue
            module.__dict__.pop(_ORIGINAL_FORWARD, None)
            del module.__dict__["forward"]
            if before is not None:
                module.__dict__["forward"] = before
        for group in self.groups:
            for layer in group.layers:
                for module in layer.layer.modules():
                    module.__dict__.pop(LAYER_ATTRIBUTE, None)

    def sizes(self, activation_bytes: int | None, weights_dtype: torch.dtype | None = None) -> ModelSizes:
        if (key := (activation_bytes, weights_dtype)) not in self._sizes:
            named: Any = {"activation_bytes": activation_bytes, "weights_dtype": weights_dtype}
            named["device_type"] = next(self.model.parameters()).device.type
            self._sizes[key] = ModelSizes.for_config(self.model, self.context.asked, **named)
        return self._sizes[key]

    def regroup(self, layers_per_group: Any) -> None:
        """Other groups of the same layers."""
        layers = [layer for group in self.groups for layer in group.layers]
        height = self._height(layers_per_group, len(layers))
        if height == max(len(group.layers) for group in self.groups):
            return
        self._zero3.check_height(height)
        starts = range(0, len(layers), height)
        self.groups = [LayerGroup(layers[start : start + height], self.context) for start in starts]
        self._number_groups()

    def _number_groups(self) -> None:
        for num_above, group in enumerate(reversed(self.groups)):
            group.num_above, group.is_last = num_above, num_above == 0

    @staticmethod
    def _height(layers_per_group: int | str, num_layers: int) -> int:
        height = num_layers if layers_per_group == "all" else int(layers_per_group)
        if height > num_layers:
            raise ValueError(f"layers_per_group={height}, but the model has {num_layers} layers: write 'all'")
        return height

    def __deepcopy__(self, memo: dict[int, Any]) -> ChunkedModel:
        memo[id(self)] = twin = object.__new__(type(self))
        twin.__dict__ = copy.deepcopy(self.__dict__, memo)
        return twin

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError("a chunked model cannot be pickled: call unchunk_model first, or save_pretrained")

    def report(self) -> ChunkReport:
        head = tiled_head(self.model)
        reasons, config = self.context.attention.reasons, self.context.config
        return ChunkReport(
            num_layers=sum(len(group.layers) for group in self.groups),
            layers_per_group=max(len(group.layers) for group in self.groups),
            num_groups=len(self.groups),
            chunk_size=int(config.chunk_size),
            retained_chunks=int(config.retained_chunks),
            reason=self.context.reason or "auto: chosen in the first step",
            config=config,
            rebuilds_kv=config.rebuilds_kv,
            attention=" and ".join(reasons) or config.attention,
            attention_reason="; ".join(reasons.values()) or "chosen in the first step",
            head_tile_tokens=None
            if head is None
            else tile_tokens(head.out_features, head.weight.element_size()),
            sample=None if self.context.sample is None else self.context.sample.report,
        )

    def _group(self, modules: list[nn.Module], first_index: int | None) -> LayerGroup:
        """A group of decoder layers, or, without an index, of modules that treat each token alone."""
        layers = []
        for offset, module in enumerate(modules):
            state = None
            if first_index is not None:
                state = self._states[first_index + offset]
                for submodule in module.modules():
                    submodule.__dict__[LAYER_ATTRIBUTE] = state
            layer = GroupLayer(module, state)
            self._replace_forward(module, layer.forward)
            layers.append(layer)
        return LayerGroup(layers, self.context)

    def _replace_forward(self, module: nn.Module, forward: Any) -> None:
        self._forwards.append((module, forward, module.__dict__.get("forward")))
        module.__dict__["forward"] = forward


def _causal_lm_forward(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A causal LM's forward; with labels, without ever making the logits of the whole sequence."""
    handle = model.__dict__.get(_HANDLE)
    if handle is not None and model.training and torch.is_grad_enabled():
        given = (kwargs.get("inputs_embeds"), kwargs.get("input_ids"), *args)
        for tokens in [x for x in given if isinstance(x, Tensor)][:1]:
            mixed = 2 if torch.is_autocast_enabled(tokens.device.type) else None
            num_rows, num_tokens = tokens.shape[:2]
            resolve_auto_values(model, num_tokens=num_tokens, num_rows=num_rows, activation_bytes=mixed)
    names = list(inspect.signature(model.forward).parameters) if len(args) > 1 else ["input_ids"]
    noted = nullcontext() if handle is None else handle.context.labels.noted(names, args, kwargs)
    with (
        noted,
        nullcontext() if handle is None or kwargs.get("labels") is None else lazy_logits(handle.model),
    ):
        return model.__dict__[_ORIGINAL_FORWARD](*args, **kwargs)


def _decoder_forward(decoder: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A decoder's forward, in chunks unless it uses a cache."""
    context = decoder.__dict__.get(_CONTEXT)
    running = nullcontext(kwargs) if context is None else context.running(decoder, args, kwargs)
    with running as kwargs, noise_by_segment(decoder, context):
        return decoder.__dict__[_ORIGINAL_FORWARD](*args, **kwargs)


def _method(forward: Callable[..., Any], module: nn.Module) -> MethodType:
    """`forward` as a method with `module`'s signature, which trainers read; torch.compile leaves it alone."""
    module.__dict__[_ORIGINAL_FORWARD] = module.forward
    return method_like(module.forward, torch.compiler.disable(partial(forward)), module)


def _causal_lm(model: nn.Module) -> PreTrainedModel:
    inner = causal_lm_of(model)
    if not isinstance(inner, PreTrainedModel):
        raise ValueError(
            f"{type(inner).__name__} is not a transformers model: pass the model itself, before DDP, FSDP, "
            "DeepSpeed or torch.compile wrap it"
        )
    return inner


def _handle(model: PreTrainedModel) -> ChunkedModel:
    handle = model.__dict__.get(_HANDLE)
    if not isinstance(handle, ChunkedModel):
        raise ValueError("the model is not chunked: call chunk_model(model, config) first")
    return handle
