"""Tiny image-text models, and rows of tokens with images for them.

As in `model_zoo`, a class's own default config is shrunk by the names of its attributes; those of towers are
here. How a class takes its images is not told by its config: the ways in which processors hand them over are
tried in turn, and the first one that the model makes two images' features of is taken.
"""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from tests.helpers.model_zoo import (
    FIRST_PLAIN_TOKEN,
    OVERRIDES,
    VOCAB_SIZE,
    merged,
    redraw,
    shrunk,
)

IMAGE, PATCH = 32, 8
"""Pixels along a side."""
_MOST_PARAMETERS = 10_000_000
_WIDTH, _SIDE = 32, IMAGE // PATCH
_TOWER_SIZES = {
    "depth num_hidden_layers num_global_layers": 2,
    "attention_heads num_attention_heads num_heads": 4,
    "out_hidden_size embed_dim projection_dim vision_output_dim projector_input_dim projector_output_dim "
    "adapter_in_dim text_hidden_size hidden_size patch_embed_hidden_size": _WIDTH,
    "image_size max_image_size window_size": IMAGE,
    "patch_size": PATCH,
    "num_position_embeddings num_patches max_num_patches": _SIDE**2,
    "pos_emb_height pos_emb_width": _SIDE,
}
_TOWER_SIZE_OF = {name: size for names, size in _TOWER_SIZES.items() for name in names.split()}
_LAYER_INDICES = {"deepstack_visual_indexes": [0], "fullatt_block_indexes": [1]}

_THREE_PLANES = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
_TILED = {"image_grid_pinpoints": [[IMAGE, 2 * IMAGE]]}
IMAGE_OVERRIDES: dict[str, dict[str, Any]] = {
    # the rotary sections of the default config are those of wider heads
    **{
        name: {"text_config": {"rope_parameters": _THREE_PLANES}}
        for name in (
            "Glm46VForConditionalGeneration",
            "Glm4vForConditionalGeneration",
            "GlmOcrForConditionalGeneration",
            "HunYuanVLForConditionalGeneration",
            "PaddleOCRVLForConditionalGeneration",
            "Qwen2VLForConditionalGeneration",
            "Qwen2_5_VLForConditionalGeneration",
        )
    },
    "Glm4vMoeForConditionalGeneration": {
        "text_config": {"rope_parameters": {**_THREE_PLANES, "partial_rotary_factor": 1.0}}
    },
    # how many tokens an image has
    "AriaForConditionalGeneration": {"projector_patch_to_query_dict": {_SIDE**2: 4}},
    "Gemma3ForConditionalGeneration": {"mm_tokens_per_image": 4},
    "LlavaNextForConditionalGeneration": _TILED,
    "LlavaNextVideoForConditionalGeneration": _TILED,
    "LlavaOnevisionForConditionalGeneration": _TILED,
    # the default layers are beyond the second one
    "VipLlavaForConditionalGeneration": {"vision_feature_layers": [-1, -2]},
    # it decodes images, too
    "JanusForConditionalGeneration": {
        "vq_config": {"base_channels": 32, "num_embeddings": 64, "channel_multiplier": [1, 1]}
    },
    # it has no default
    "Blip2ForConditionalGeneration": {"image_token_index": 1},
}


def image_class_names() -> list[str]:
    """The image-text classes, each once."""
    return sorted(set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()), key=str.lower)


def tiny_image_config(class_name: str) -> PreTrainedConfig:
    """The class's default config, shrunk, dropout off; images have 16 patches."""
    config_class = getattr(transformers, class_name).config_class
    default = config_class()
    changes = merged(shrunk(default), OVERRIDES.get(class_name, {}))
    num_tokens = 0
    for key, value in vars(default).items():
        if isinstance(value, PreTrainedConfig):
            changes[key] = {**changes.get(key, {}), **_changes_of_part(key, value)}
        elif key.endswith(("token_id", "token_index")) and isinstance(value, int):
            num_tokens += 1  # each another one
            changes[key] = num_tokens
        elif key == "image_seq_length":
            changes[key] = _SIDE**2
        elif key in ("projection_dim", "projector_hidden_size"):
            changes[key] = _WIDTH
    config: PreTrainedConfig = config_class(**merged(changes, IMAGE_OVERRIDES.get(class_name, {})))
    config._experts_implementation = "eager"  # grouped matrix products have no fp64
    config._attn_implementation = "eager"
    return config


def _changes_of_part(name: str, config: PreTrainedConfig) -> dict[str, Any]:
    """Of the config of a tower, or of the decoder."""
    if "vision" not in name:
        rope = getattr(config, "rope_parameters", None)
        if not isinstance(rope, dict) or not rope.get("mrope_section"):
            return {}
        rope = {**rope, "mrope_section": _THREE_PLANES["mrope_section"]}
        rope |= {"partial_rotary_factor": 1.0} if "partial_rotary_factor" in rope else {}
        return {"rope_parameters": rope}
    found: dict[str, Any] = {}
    for key, value in vars(config).items():
        if key in _LAYER_INDICES:
            found[key] = _LAYER_INDICES[key]
        elif key in ("image_size", "patch_size") and isinstance(value, (list, tuple)):
            found[key] = [_TOWER_SIZE_OF[key]] * len(value)
        elif key in _TOWER_SIZE_OF and isinstance(value, int) and not isinstance(value, bool):
            found[key] = _TOWER_SIZE_OF[key]
    return found


def tiny_image_model(class_name: str) -> PreTrainedModel:
    """A model in fp64, in training mode, with weights so large that each token depends on those before.

    Raises:
        ValueError: it is not tiny.
    """
    model_class, config = getattr(transformers, class_name), tiny_image_config(class_name)
    with torch.device("meta"):
        num_parameters = model_class(config).num_parameters()
    if num_parameters > _MOST_PARAMETERS:
        raise ValueError(f"{class_name} has {num_parameters:,} parameters")
    with torch.random.fork_rng():
        torch.manual_seed(zlib.crc32(class_name.encode()))
        model: PreTrainedModel = model_class(config).double().train()
        for parameter in model.parameters():
            redraw(parameter)
    return model


def image_rows(model: PreTrainedModel) -> dict[str, Tensor]:
    """Two rows with an image in each, the second one padded on the right.

    Raises:
        ValueError: no way of handing over images is the model's.
    """
    images, sizes = _images(model)
    config: Any = model.config
    token = getattr(config, "image_token_id", None)
    token = config.image_token_index if token is None else token
    num_tokens = max(sizes) + 21
    input_ids = torch.randint(FIRST_PLAIN_TOKEN, VOCAB_SIZE, (2, num_tokens))
    is_image = torch.zeros(2, num_tokens, dtype=torch.bool)
    is_image[0, 3 : 3 + sizes[0]] = is_image[1, 6 : 6 + sizes[1]] = True
    input_ids[is_image] = token
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 13 + sizes[1] :] = 0
    taken = inspect.signature(model.forward).parameters
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "labels": input_ids.masked_fill((attention_mask == 0) | is_image, -100),
        **{key: is_image.long() for key in ("mm_token_type_ids", "token_type_ids") if key in taken},
        **images,
    }


def _images(model: PreTrainedModel) -> tuple[dict[str, Tensor], list[int]]:
    """Two images as the model takes them, and how many tokens each has."""
    inner: Any = model if hasattr(model, "get_image_features") else model.model
    taken = inspect.signature(inner.get_image_features).parameters
    faults = []
    for images in _ways(getattr(model.config, "vision_config", None)):
        if not set(images) <= set(taken):
            continue
        try:
            with torch.no_grad():
                sizes = _num_tokens(inner.get_image_features(**images, return_dict=True))
        except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
            faults.append(str(error))
            continue
        if len(sizes) == 2:
            return images, sizes
    raise ValueError(f"no images for {type(model).__name__}: {faults}")


def _ways(vision: Any) -> Iterator[dict[str, Tensor]]:
    """Two images, as processors hand them over."""
    channels = getattr(vision, "num_channels", None) or getattr(vision, "in_channels", None) or 3
    depth = getattr(vision, "temporal_patch_size", 1) or 1
    grid = torch.tensor([[1, _SIDE, _SIDE], [1, _SIDE // 2, _SIDE]])
    num_patches = int(grid.prod(1).sum())
    flat = torch.randn(num_patches, channels * depth * PATCH**2)
    yield {"pixel_values": flat, "image_grid_thw": grid}
    yield {"pixel_values": torch.randn(num_patches, channels, PATCH, PATCH), "image_grid_thw": grid}
    whole = torch.randn(2, channels, IMAGE, IMAGE)
    yield {"pixel_values": whole}
    yield {"pixel_values": whole, "image_sizes": torch.full((2, 2), IMAGE)}
    yield {"pixel_values": whole[:, None]}
    tiles = torch.randn(2, 3, channels, IMAGE, IMAGE)
    yield {"pixel_values": tiles, "image_sizes": torch.tensor([[IMAGE, 2 * IMAGE]] * 2)}
    shapes = grid[:, 1:]
    yield {
        "pixel_values": torch.randn(2, _SIDE**2, channels * PATCH**2),
        "spatial_shapes": shapes,
        "pixel_attention_mask": torch.arange(_SIDE**2) < shapes.prod(1)[:, None],
    }


def _num_tokens(features: Any) -> list[int]:
    """By image."""
    found = getattr(features, "pooler_output", features)
    if isinstance(found, tuple) and not all(isinstance(x, Tensor) and x.ndim == 2 for x in found):
        found = found[0]
    if isinstance(found, Tensor) and found.ndim == 2:
        found = found.chunk(2)
    return [x.shape[:-1].numel() for x in found]
