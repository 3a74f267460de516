"""Tiny random models of every causal LM class that the installed transformers knows.

A class's own default config is shrunk by the names of its attributes: widths, heads, experts, windows,
vocabularies. Of the per-layer lists (`layer_types` and the like) the first layer of each kind is kept. What
this does not do for a class is in `OVERRIDES`, with the reason.
"""

from __future__ import annotations

import copy
import inspect
import zlib
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.configuration_utils import ALLOWED_LAYER_TYPES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB_SIZE = 64
WINDOW = 8
FIRST_PLAIN_TOKEN = 8
"""Token ids below may be special ones."""

_SIZES = {
    "vocab_size decoder_vocab_size unpadded_vocab_size vocab_size_per_layer_input shape_vocab_size "
    "pronunciation_vocab_size audio_vocab_size encoder_hash_byte_group_vocab entity_vocab_size "
    "ngram_vocab_size_base": VOCAB_SIZE,
    "hidden_size d_model n_embd word_embed_proj_dim embedding_size dim_model attention_hidden_size "
    "emb_dim decoder_hidden_size hidden_size_global backbone_hidden_size output_channels input_size": 32,
    "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim ffn_hidden_size dff dim_ff "
    "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size intermediate_size_mlp "
    "dense_intermediate_size d_inner expert_ffn_hidden_size shared_experts_intermediate_size "
    "moe_shared_expert_intermediate_size mlp_dim": 48,
    "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads "
    "o_groups num_decoder_attention_heads num_encoder_attention_heads swa_num_attention_heads "
    "linear_num_heads index_n_heads linear_num_key_heads linear_num_value_heads mamba_n_heads "
    "mamba_num_heads num_experts n_routed_experts num_local_experts moe_num_experts zero_expert_num "
    "index_topk n_mamba_heads floor_scale": 4,
    "num_key_value_heads kv_n_heads num_kv_heads swa_num_key_value_heads num_experts_per_tok "
    "num_experts_per_token num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers "
    "num_decoder_layers num_encoder_layers num_layers_per_stack moe_topk moe_top_k moe_k top_k_experts "
    "num_global_key_value_heads encoder_hash_byte_group_nb_functions no_rope_layer_interval": 2,
    "head_dim dim_head kv_channels qk_rope_head_dim qk_nope_head_dim v_head_dim attention_head_dim "
    "swa_head_dim rotary_dim global_head_dim swa_v_head_dim linear_head_dim linear_key_head_dim "
    "linear_value_head_dim d_rel index_head_dim mamba_d_state ssm_state_size state_size laurel_rank "
    "o_lora_rank hc_lowrank altup_lora_rank mamba_dt_rank time_step_rank": 8,
    "qk_head_dim q_lora_rank kv_lora_rank mamba_d_head mamba_head_dim hidden_size_per_layer_input d_kv "
    "full_attention_head_dim ple_embed_dim": 16,
    "sliding_window sliding_window_size attention_chunk_size local_attention window_size attention_window "
    "local_attention_window_len keep_window_size": WINDOW,
    "n_group topk_group num_expert_group n_shared_experts num_shared_experts moe_num_shared_experts "
    "first_k_dense_replace num_dense_layers max_window_layers n_groups mamba_n_groups": 1,
    "mamba_chunk_size chunk_size": 8,
    "max_position_embeddings n_positions n_ctx max_seq_len model_max_length "
    "original_max_position_embeddings max_source_positions max_target_positions rel_extent": 128,
}
_SIZE_OF = {name: size for names, size in _SIZES.items() for name in names.split()}
_LAYER_COUNTS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "decoder_layers",
    "num_decoder_layers",
)
_SWITCHES = {
    "is_decoder": True,
    "use_sliding_window": True,
    "use_cache": False,
    "output_router_logits": False,
}

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}

OVERRIDES: dict[str, dict[str, Any]] = {
    # by default, the attention layers are beyond the second one
    "BambaForCausalLM": {"attn_layer_indices": [1]},
    "JambaForCausalLM": {"attn_layer_period": 2, "attn_layer_offset": 1},
    # the default config has no rope parameters for its layer types
    "CohereCompassForCausalLM": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    # rope_theta is read from the sub-config, whose default has none; its clamp has no default bound
    "DbrxForCausalLM": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    # MLA: as many key/value heads as heads; head_dim is the sum of its two parts
    "Dots3NoteForCausalLM": {
        "num_key_value_heads": 4,
        "head_dim": 16,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    # by default, all its layers keep state
    "GraniteMoeHybridForCausalLM": {
        "layer_types": ["linear_attention", "full_attention"],
        "num_hidden_layers": 2,
    },
    # widths that must multiply to each other
    "FalconH1ForCausalLM": {"mamba_d_ssm": 64},
    "Mamba2ForCausalLM": {"head_dim": 16},
    "ReformerModelWithLMHead": {"axial_pos_embds_dim": [8, 24], "axial_pos_shape": [8, 16]},
    # of each layer type, one layer that shares keys and values of another
    "Gemma3nForCausalLM": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "intermediate_size": 48,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    # one layer of each kind, not two of the slow one
    "BailingHybridForCausalLM": {
        "layer_types": ["linear_attention", "full_attention"],
        "mlp_layer_types": ["dense", "sparse"],
        "num_hidden_layers": 2,
    },
    "KimiLinearForCausalLM": {
        "layer_types": ["linear_attention", "full_attention"],
        "mlp_layer_types": ["dense", "sparse"],
        "num_hidden_layers": 2,
    },
    # layer types have no default
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    # the indexer's sizes have no default
    "Qwen4ExpForCausalLM": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    # its attention block is shared by layers from the third hybrid one on
    "ZambaForCausalLM": {
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "num_hidden_layers": 3,
    },
    # by default, the cross-attention layers are beyond the second one
    "MllamaForCausalLM": {"num_hidden_layers": 3, "cross_attention_layers": [1]},
    # it has no default language
    "XmodForCausalLM": {"default_language": "en_XX", "languages": ["en_XX"]},
    # it routes each token to one expert
    "ZayaForCausalLM": {"num_experts_per_tok": 1},
}

_DRAFT_HEAD = "a draft head without a default config: it reads the keys and values of another model"
NOT_BUILT = {
    "Gemma3nForConditionalGeneration": "its vision tower needs the timm package",
    "Gemma4AssistantForCausalLM": _DRAFT_HEAD,
    "Gemma4UnifiedAssistantForCausalLM": _DRAFT_HEAD,
}
"""Classes that cannot be tiny models by themselves, and why."""

AUDIO_CODES = {"MusicgenForCausalLM", "MusicgenMelodyForCausalLM"}
"""Classes whose tokens are audio codes: four rows of `input_ids` are one of the model's."""


def class_names() -> list[str]:
    """The causal LM classes, each once."""
    names: dict[str, None] = {}
    for entry in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        names |= dict.fromkeys([entry] if isinstance(entry, str) else entry)
    return sorted(names, key=str.lower)


def tiny_config(class_name: str, layer_types: list[str] | None = None) -> PreTrainedConfig:
    """The class's default config, shrunk, dropout off; with one layer of each of `layer_types`, if given."""
    model_class = getattr(transformers, class_name)
    changes = merged(shrunk(model_class.config_class()), OVERRIDES.get(class_name, {}))
    if layer_types is not None:
        changes |= {"layer_types": layer_types, "num_hidden_layers": len(layer_types)}
    config: PreTrainedConfig = model_class.config_class(**changes)
    config._experts_implementation = "eager"  # grouped matrix products have no fp64
    config._attn_implementation = "eager"
    return config


def other_layer_types(class_name: str) -> list[str]:
    """The layer types of the default config and those that the class knows beside them; empty if none."""
    model_class = getattr(transformers, class_name)
    default = getattr(tiny_config(class_name), "layer_types", None)
    source = Path(inspect.getfile(model_class)).read_text()
    known = [
        kind
        for kind in ALLOWED_LAYER_TYPES
        if f'"{kind}"' in source and kind not in ("moe", "sparse", "dense")
    ]
    name = model_class.config_class.attribute_map.get("layer_types", "layer_types")
    if isinstance(getattr(model_class.config_class, name, None), property):  # follows from other settings
        return []
    return [] if default is None or set(known) <= set(default) else list(dict.fromkeys([*default, *known]))


def tiny_model(class_name: str, layer_types: list[str] | None = None) -> PreTrainedModel:
    """A model in fp64, in training mode, with weights so large that each token depends on those before."""
    with torch.random.fork_rng():
        torch.manual_seed(zlib.crc32(class_name.encode()))
        model: PreTrainedModel = (
            getattr(transformers, class_name)(tiny_config(class_name, layer_types)).double().train()
        )
        for parameter in model.parameters():
            redraw(parameter)
    return model


def redraw(parameter: nn.Parameter) -> None:
    """Initial weights are so small, or zero, that an error in the attention would not show."""
    with torch.no_grad():
        if parameter.ndim < 2:
            parameter += 0.1 * torch.randn_like(parameter)
        else:
            parameter.copy_(torch.randn_like(parameter) * 1.5 / parameter.shape[-1] ** 0.5)


def shrunk(config: PreTrainedConfig) -> dict[str, Any]:
    """The arguments that make a small config of the same kind."""
    values = {key: value for key, value in vars(config).items() if not key.startswith("_")}
    changes: dict[str, Any] = {}
    num_layers = next((values[key] for key in _LAYER_COUNTS if isinstance(values.get(key), int)), 0)
    per_layer = {
        key: value
        for key, value in values.items()
        if isinstance(value, (list, tuple)) and len(value) == num_layers > 2
    }
    kept = _first_of_each_kind(per_layer)
    for key, value in values.items():
        if key in config.sub_configs and isinstance(value, PreTrainedConfig):
            changes[key] = shrunk(value)
        elif key in per_layer:
            changes[key] = [value[index] for index in kept]
        elif kept and key in _LAYER_COUNTS:
            changes[key] = len(kept)
        elif key in _SWITCHES:
            changes[key] = _SWITCHES[key]
        elif (
            ("drop" in key or "jitter" in key)
            and isinstance(value, (int, float))
            and not isinstance(value, bool)
        ):
            changes[key] = type(value)(0)
        elif key.endswith("token_id") and isinstance(value, int):
            changes[key] = value % FIRST_PLAIN_TOKEN
        elif (
            key in _SIZE_OF
            and not isinstance(value, bool)
            and (value is None or (isinstance(value, int) and value > 0))
        ):
            changes[key] = _SIZE_OF[key]
    if (
        "kv_lora_rank" in changes and "num_key_value_heads" in changes
    ):  # latent attention expands to all heads
        changes["num_key_value_heads"] = _SIZE_OF["num_attention_heads"]
    return changes


def _first_of_each_kind(per_layer: dict[str, Any]) -> list[int]:
    """Indices of layers, ascending: the first of each kind, at least two."""
    if not per_layer:
        return []
    first: dict[str, int] = {}
    for index, kind in enumerate(zip(*per_layer.values(), strict=True)):
        first.setdefault(repr(kind), index)
    return sorted(first.values())[:4] if len(first) > 1 else [0, 1]


def merged(changes: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    result = copy.copy(changes)
    for key, value in overrides.items():
        result[key] = (
            merged(result.get(key, {}), value) if isinstance(value, dict) and key in changes else value
        )
    return result
