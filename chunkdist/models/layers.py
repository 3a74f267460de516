"""Finds a causal LM's decoder and its layers, and refuses what is known not to be exact in chunks."""

from __future__ import annotations

import inspect
import re
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from chunkdist.attention.cell import LayerState
from chunkdist.errors import UnsupportedModelError
from chunkdist.models.arguments import LayerSignature

_ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention", "attention"}
_STATE_LAYERS = {"linear_attention", "conv", "hybrid", "hybrid_sliding"}
_TOKENWISE_LAYERS = {"mlp", "moe"}
"""Kinds of layers, as transformers' configs name them."""
_MIXERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.RNNBase, nn.RNNCellBase, nn.ZeroPad2d)
"""Modules that look at neighbouring tokens; the last one is how token shifts are written."""
_MIXER_NAMES = re.compile(
    r"Mamba|SSM(?!LP)|RecurrentBlock|Rwkv|RWKV|DeltaNet|LinearAttention|ShortConv|Hyena|Indexer"
)
"""Classes that need no such module."""


def find_layers(model: PreTrainedModel) -> tuple[list[nn.Module], nn.Module, list[nn.Module]]:
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
    lists = [child for child in decoder.children() if _is_list_of(num_layers, child)]
    layers = [layer for child in lists if isinstance(child, nn.ModuleList) for layer in child]
    if len({id(layer) for layer in layers}) < len(layers):
        raise UnsupportedModelError(f"{name} uses one layer several times")
    around = [module for module in model.modules() if module is not model and decoder in module.modules()]
    entries = [module for module in around if "input_ids" in inspect.signature(module.forward).parameters]
    if not entries:
        raise UnsupportedModelError(
            f"{name} has no module that takes input_ids, other than itself: cannot tell where it begins"
        )
    return entries, decoder, layers


def adds_between_layers(model: nn.Module) -> bool:
    """Whether a decoder may add features of images to the hidden states between its layers (deepstack, as in
    Qwen3-VL): its groups have one layer each."""
    forwards = (module.forward for module in model.modules() if isinstance(module, PreTrainedModel))
    return any("deepstack_visual_embeds" in inspect.signature(forward).parameters for forward in forwards)


def causal_lm_of(model: Any) -> Any:
    """A PEFT model's own; else itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _lists_of(num_layers: object, root: nn.Module) -> list[tuple[str, nn.Module]]:
    parents = root.named_modules()
    return [(path, p) for path, p in parents for child in p.children() if _is_list_of(num_layers, child)]


def _is_list_of(num_layers: object, module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList) and len(module) == num_layers


def refuse_known(model: PreTrainedModel, decoder: nn.Module, layers: list[nn.Module]) -> None:
    name = type(model).__name__
    config = model.config.get_text_config()
    if not (decoder if isinstance(decoder, PreTrainedModel) else model)._can_set_attn_implementation():
        raise UnsupportedModelError(
            f"{name} does not call transformers' AttentionInterface: its attention cannot be chunked"
        )
    kinds = set(_kinds_of(config)) - _ATTENTION_LAYERS - _STATE_LAYERS - _TOKENWISE_LAYERS
    if kinds:
        raise UnsupportedModelError(f"{name} has layers of type {', '.join(sorted(map(str, kinds)))}")
    if getattr(config, "num_kv_shared_layers", 0):
        raise UnsupportedModelError(f"{name} shares keys and values between layers")
    if getattr(config, "is_decoder", True) is False and hasattr(config, "add_cross_attention"):
        raise UnsupportedModelError(f"{name} is set up as an encoder (is_decoder=False): it is not causal")
    for layer in layers:
        mixer = mixer_of(layer)
        if mixer is not None and ("Indexer" in mixer or LayerSignature(layer).cache is None):
            raise UnsupportedModelError(
                f"{name} has {mixer} in its layers: state between tokens other than keys and values, and not "
                "in a cache from which it could be handed on"
            )
    for kind in dict.fromkeys(type(module) for layer in layers for module in layer.modules()):
        if _counts_tokens(kind):
            raise UnsupportedModelError(
                f"{name}: {kind.__name__} takes its tokens' positions from their number, and a chunk does "
                "not begin at 0"
            )


def layer_states(config: PreTrainedConfig, layers: list[nn.Module]) -> list[LayerState]:
    """What is known of each layer before it has run."""
    kinds = _kinds_of(config)
    kinds = kinds if len(kinds) == len(layers) else [""] * len(layers)
    relays = any(mixer_of(layer) is not None for layer in layers)
    return [
        LayerState(
            name=f"layer {index} ({type(layer).__name__})",
            relays=relays,
            mixes=any(isinstance(module, _MIXERS) for module in layer.modules()),
            tokenwise=kind in _TOKENWISE_LAYERS,
        )
        for index, (layer, kind) in enumerate(zip(layers, kinds, strict=True))
    ]


def mixer_of(layer: nn.Module) -> str | None:
    """The class of a module inside a layer that looks at other tokens and is not attention."""
    for module in layer.modules():
        if isinstance(module, _MIXERS) or _MIXER_NAMES.search(type(module).__name__):
            return type(module).__name__
    return None


def _kinds_of(config: PreTrainedConfig) -> list[str]:
    return list(getattr(config, "layer_types", None) or ())


def _counts_tokens(kind: type[nn.Module]) -> bool:
    """Whether a module makes its own positions, from its cache and the number of tokens that it gets."""
    try:
        source = inspect.getsource(kind.forward)
    except (OSError, TypeError):
        return False
    return "arange(" in source and "get_seq_length(" in source


def norms_of(decoder: nn.Module) -> list[nn.Module]:
    """The norms beside the decoder's layers, which treat each token alone."""
    return [
        module
        for name, module in decoder.named_children()
        if "norm" in type(module).__name__.lower() or "norm" in name.lower()
    ]


def configs_of(entries: list[nn.Module], decoder: nn.Module) -> list[PreTrainedConfig]:
    """The config objects, each once, from which the decoder's masks and attention modules read their
    implementation. Towers beside it, of images or sounds, have configs of their own, and attend as they would
    without chunks.

    Args:
        entries: The modules around the layers that take token ids.
    """
    found = [getattr(module, "config", None) for module in [*entries, *decoder.modules()]]
    configs = [config for config in found if isinstance(config, PreTrainedConfig)]
    configs += [config.get_text_config() for config in configs]
    return list({id(config): config for config in configs}.values())
