"""`chunk_model`: finds a model's decoder layers, forms groups, and puts the chunked forward in their place.

No code for any particular model: layers are the elements of the decoder's one list of layers, their attention
is whatever calls transformers' `AttentionInterface`. What cannot be computed exactly is refused.
"""

from __future__ import annotations

import copy
import inspect
import logging
import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial, wraps
from types import MethodType
from typing import Any, NoReturn, SupportsIndex, TypeVar

from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel

from chunkdist.attention.function import ATTENTION_NAME, LAYER_ATTRIBUTE, LayerState, attend
from chunkdist.attention.mask import chunk_mask
from chunkdist.config import ChunkConfig
from chunkdist.context import ChunkContext
from chunkdist.errors import UnsupportedModelError
from chunkdist.group_layer import GroupLayer
from chunkdist.layer_group import LayerGroup
from chunkdist.loss import lazy_logits, tile_tokens, tiled_head
from chunkdist.sampling import SampleReport
from chunkdist.sharding.zero3 import Zero3Layers

logger = logging.getLogger(__name__)

_HANDLE = "_chunkdist_model"
_CONTEXT = "_chunkdist_context"
_ORIGINAL_FORWARD = "_chunkdist_original_forward"
_ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention", "attention"}
_MIXERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.RNNBase, nn.RNNCellBase, nn.ZeroPad2d)
"""Modules that look at neighbouring tokens; the last one is how token shifts are written."""
_MIXER_NAMES = re.compile(
    r"Mamba|SSM(?!LP)|RecurrentBlock|Rwkv|RWKV|DeltaNet|LinearAttention|ShortConv|Hyena|Indexer"
)
"""The same for classes that need no such module."""

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


class ChunkedModel:
    """Everything that `chunk_model` puts into a model."""

    def __init__(self, model: PreTrainedModel, config: ChunkConfig) -> None:
        entries, decoder, layers = _find_layers(model)
        _refuse_known(model, entries[-1], layers)
        num_layers = len(layers)
        height = num_layers if config.layers_per_group == "all" else config.layers_per_group
        assert isinstance(height, int)
        if height > num_layers:
            raise ValueError(f"layers_per_group={height}, but the model has {num_layers} layers: write 'all'")
        self.model = model
        self.entries = entries
        self.config = config
        self.context = ChunkContext(config, _configs([*entries, decoder, *layers]))
        self._zero3 = Zero3Layers(layers, height)
        self.groups: list[LayerGroup] = []
        self._forwards: list[tuple[nn.Module, Any, Any]] = []
        for start in range(0, num_layers, height):
            self.groups.append(self._group(layers[start : start + height], start))
        self.groups[-1].is_last = True
        if tiled_head(model) is None:
            logger.warning(
                "chunkdist: the logits of the whole sequence will be made: the output layer, %s, is no plain "
                "linear layer, or the loss is not the usual one",
                type(model.get_output_embeddings()).__name__,
            )
        for name, module in decoder.named_children():
            if "norm" in type(module).__name__.lower() or "norm" in name.lower():
                self._group([module], None)
        for entry in entries:
            entry.__dict__[_CONTEXT] = self.context
            self._replace_forward(entry, _method(_decoder_forward, entry))
        self._replace_forward(model, _method(_causal_lm_forward, model))

    def remove(self) -> None:
        """Puts the forwards back; where others have wrapped ours, ours only passes on from now."""
        self.context.bypassed = True
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

    def __deepcopy__(self, memo: dict[int, Any]) -> ChunkedModel:
        memo[id(self)] = twin = object.__new__(type(self))
        twin.__dict__ = copy.deepcopy(self.__dict__, memo)
        return twin

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError("a chunked model cannot be pickled: call unchunk_model first, or save_pretrained")

    def report(self) -> ChunkReport:
        head = tiled_head(self.model)
        reasons = self.context.attention.reasons
        return ChunkReport(
            num_layers=sum(len(group.layers) for group in self.groups),
            layers_per_group=max(len(group.layers) for group in self.groups),
            num_groups=len(self.groups),
            chunk_size=int(self.config.chunk_size),
            retained_chunks=int(self.config.retained_chunks),
            rebuilds_kv=self.config.rebuilds_kv,
            attention=" and ".join(reasons) or self.config.attention,
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
                index = first_index + offset
                state = LayerState(name=f"layer {index} ({type(module).__name__})")
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
    with nullcontext() if handle is None or kwargs.get("labels") is None else lazy_logits(handle.model):
        return model.__dict__[_ORIGINAL_FORWARD](*args, **kwargs)


def _decoder_forward(decoder: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A decoder's forward, in chunks unless it uses a cache."""
    context = decoder.__dict__.get(_CONTEXT)
    with nullcontext(kwargs) if context is None else context.running(decoder, args, kwargs) as kwargs:
        return decoder.__dict__[_ORIGINAL_FORWARD](*args, **kwargs)


def _method(forward: Callable[..., Any], module: nn.Module) -> MethodType:
    """`forward` as a method of `module`, with its own signature, which trainers and `generate` read."""
    module.__dict__[_ORIGINAL_FORWARD] = module.forward
    own: Any = getattr(module.forward, "__func__", module.forward)
    return MethodType(wraps(own)(partial(forward)), module)


def _causal_lm(model: nn.Module) -> PreTrainedModel:
    get_base_model: Any = getattr(model, "get_base_model", None)  # PEFT's
    inner = model if get_base_model is None else get_base_model()
    if not isinstance(inner, PreTrainedModel):
        raise ValueError(
            f"{type(inner).__name__} is not a transformers model: pass the model itself, before DDP, FSDP or "
            "DeepSpeed wrap it"
        )
    return inner


def _handle(model: PreTrainedModel) -> ChunkedModel:
    handle = model.__dict__.get(_HANDLE)
    if not isinstance(handle, ChunkedModel):
        raise ValueError("the model is not chunked: call chunk_model(model, config) first")
    return handle


def _find_layers(model: PreTrainedModel) -> tuple[list[nn.Module], nn.Module, list[nn.Module]]:
    """The modules around the layers that take token ids, the decoder, and its layers.

    Of the first, the outermost one that is called makes the masks and is where a chunked forward begins.
    The layers are the one list as long as `num_hidden_layers`; beside other towers, the least nested one.
    """
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{name} is an encoder-decoder: its decoder attends to something else than itself"
        )
    num_layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    found = _lists_of(num_layers, model.get_decoder()) or _lists_of(num_layers, model)
    depth = min((path.count(".") for path, _ in found), default=0)
    found = [(path, decoder) for path, decoder in found if path.count(".") == depth]
    if len(found) != 1:
        raise UnsupportedModelError(
            f"{name} has {len(found)} lists of {num_layers} layers, not one: cannot tell what to chunk"
        )
    ((_, decoder),) = found
    layers = [
        layer for child in decoder.children() if _is_list_of(num_layers, child) for layer in child.children()
    ]
    if len({id(layer) for layer in layers}) < len(layers):
        raise UnsupportedModelError(f"{name} uses one layer several times")
    around = [module for module in model.modules() if module is not model and decoder in module.modules()]
    entries = [module for module in around if "input_ids" in inspect.signature(module.forward).parameters]
    if not entries:
        raise UnsupportedModelError(
            f"{name} has no module that takes input_ids, other than itself: cannot tell where it begins"
        )
    return entries, decoder, layers


def _lists_of(num_layers: object, root: nn.Module) -> list[tuple[str, nn.Module]]:
    parents = root.named_modules()
    return [(path, p) for path, p in parents for child in p.children() if _is_list_of(num_layers, child)]


def _is_list_of(num_layers: object, module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList) and len(module) == num_layers


def _refuse_known(model: PreTrainedModel, decoder: nn.Module, layers: list[nn.Module]) -> None:
    name = type(model).__name__
    config = model.config.get_text_config()
    if not (decoder if isinstance(decoder, PreTrainedModel) else model)._can_set_attn_implementation():
        raise UnsupportedModelError(
            f"{name} does not call transformers' AttentionInterface: its attention cannot be chunked"
        )
    kinds = set(getattr(config, "layer_types", None) or ()) - _ATTENTION_LAYERS
    if kinds:
        raise UnsupportedModelError(f"{name} has layers of type {', '.join(sorted(map(str, kinds)))}")
    if getattr(config, "num_kv_shared_layers", 0):
        raise UnsupportedModelError(f"{name} shares keys and values between layers")
    if getattr(config, "is_decoder", True) is False and hasattr(config, "add_cross_attention"):
        raise UnsupportedModelError(f"{name} is set up as an encoder (is_decoder=False): it is not causal")
    for path, module in (item for layer in layers for item in layer.named_modules()):
        if isinstance(module, _MIXERS) or _MIXER_NAMES.search(type(module).__name__):
            raise UnsupportedModelError(
                f"{name} has {type(module).__name__} ({path}) in its layers: state between tokens other than "
                "keys and values"
            )
    for kind in dict.fromkeys(type(module) for layer in layers for module in layer.modules()):
        if _counts_tokens(kind):
            raise UnsupportedModelError(
                f"{name}: {kind.__name__} takes its tokens' positions from their number, and a chunk does "
                "not begin at 0"
            )


def _counts_tokens(kind: type[nn.Module]) -> bool:
    """Whether a module makes its own positions, from its cache and the number of tokens that it gets."""
    try:
        source = inspect.getsource(kind.forward)
    except (OSError, TypeError):
        return False
    return "arange(" in source and "get_seq_length(" in source


def _configs(modules: list[nn.Module]) -> list[PreTrainedConfig]:
    """The config objects, each once, from which masks and attention modules read their implementation."""
    found = [getattr(submodule, "config", None) for module in modules for submodule in module.modules()]
    configs = [config for config in found if isinstance(config, PreTrainedConfig)]
    configs += [config.get_text_config() for config in configs]
    return list({id(config): config for config in configs}.values())
