"""`extend_context`: a live model is what transformers makes of a config written by hand, also in chunks."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from chunkdist import ChunkConfig, UnsupportedModelError, chunk_model, extend_context, unchunk_model
from chunkdist.models import extend
from chunkdist.models.context_length import made_for, plan_context
from tests.helpers.model_zoo import tiny_model
from tests.helpers.models import (
    VOCAB_SIZE,
    batch,
    gradients,
    largest_difference,
    norms_in_fp64,
    packed_batch,
    with_lora,
)

BEFORE, TOKENS = 32, 128
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": BEFORE,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
SCALED: dict[str, Any] = {"factor": 4.0, "original_max_position_embeddings": BEFORE}
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, **SCALED}
GEMMA3 = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
}
WINDOW = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}


def rope(theta: float, **values: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta, **values}


FAMILIES: dict[str, tuple[Any, dict[str, Any], str, dict[str, Any], int]] = {
    "Llama 3": (LlamaConfig, {"rope_parameters": rope(5e5)}, "auto", rope(5e5, **LLAMA3), TOKENS),
    "Llama 3.1": (
        LlamaConfig,
        {"rope_parameters": rope(5e5, **{**LLAMA3, "original_max_position_embeddings": 8})},
        "auto",
        rope(5e5, **{**LLAMA3, "factor": 16.0, "original_max_position_embeddings": 8}),
        TOKENS,
    ),
    "Llama 2": (LlamaConfig, {}, "auto", rope(1e4, rope_type="yarn", **SCALED), TOKENS),
    "Qwen2": (Qwen2Config, {}, "auto", rope(1e4, rope_type="yarn", **SCALED), TOKENS),
    "Qwen3": (
        Qwen3Config,
        {"rope_parameters": rope(1e6)},
        "auto",
        rope(1e6, rope_type="yarn", **SCALED),
        TOKENS,
    ),
    "Mistral": (MistralConfig, {"sliding_window": 16}, "auto", rope(1e4, rope_type="yarn", **SCALED), TOKENS),
    "Gemma 2": (Gemma2Config, WINDOW, "auto", rope(1e4, rope_type="yarn", **SCALED), TOKENS),
    "Gemma 3": (Gemma3TextConfig, WINDOW, "auto", GEMMA3, TOKENS),
    "linear": (LlamaConfig, {}, "linear", rope(1e4, rope_type="linear", factor=4.0), BEFORE),
    "ntk": (Qwen3Config, {}, "ntk", rope(1e4, rope_type="dynamic", factor=4.0), BEFORE),
}
"""A config, what is set in it, the recipe, and what is to be in the config afterwards."""


def made(name: str, *, by_hand: bool, **values: Any) -> PreTrainedModel:
    kind, given, _, rope_parameters, length = FAMILIES[name]
    given = {**SIZES, **given, **values}
    if by_hand:
        given |= {"rope_parameters": copy.deepcopy(rope_parameters), "max_position_embeddings": length}
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        kind(**copy.deepcopy(given)), attn_implementation="plain"
    )
    return model.to(torch.float64).train()


def extended(name: str, model: nn.Module) -> Any:
    return extend_context(model, TOKENS, recipe=FAMILIES[name][2])


def rotary_state(model: nn.Module) -> dict[str, Any]:
    """All that rotary modules hold, and cosines and sines at all positions."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        if type(module).__name__.endswith("RotaryEmbedding"):
            path = path.removeprefix("base_model.model.")
            found |= {f"{path}.{key}": x for key, x in module.named_buffers()}
            plain = {key: x for key, x in vars(module).items() if isinstance(x, (int, float, str, dict))}
            found |= {f"{path}.{k}": x for k, x in plain.items() if k[0] != "_" and k != "training"}
            for kind in getattr(module, "layer_types", [None]):
                arguments = {} if kind is None else {"layer_type": kind}
                pair = copy.deepcopy(module)(
                    torch.zeros(1, dtype=torch.float64), torch.arange(TOKENS)[None], **arguments
                )
                found |= {f"{path}.{kind}.{i}": x for i, x in enumerate(pair)}
    return found


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    assert found
    for key, x in expected.items():
        assert torch.equal(found[key], x) if isinstance(x, torch.Tensor) else found[key] == x, key


@pytest.mark.parametrize("name", FAMILIES)
def test_it_is_what_transformers_makes_of_a_config_by_hand(name: str, tmp_path: Path) -> None:
    model, expected = made(name, by_hand=False), made(name, by_hand=True)
    before = copy.deepcopy(rotary_state(model))
    done = extended(name, model)
    assert (done.tokens, done.before) == (TOKENS, BEFORE)
    assert model.config.rope_parameters == expected.config.rope_parameters
    assert model.config.to_dict() == expected.config.to_dict()
    ids = batch(num_tokens=TOKENS)["input_ids"]
    assert_same(rotary_state(model), rotary_state(expected))
    assert torch.equal(model(ids).logits, expected(ids).logits)
    assert not all(
        torch.equal(x, before[key]) for key, x in rotary_state(model).items() if torch.is_tensor(x)
    )
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="plain", dtype=torch.float64)
    assert loaded.config.rope_parameters == model.config.rope_parameters
    assert_same(rotary_state(loaded.to(torch.float64)), rotary_state(made(name, by_hand=True)))
    assert made_for(loaded.config) == TOKENS
    again = extended(name, loaded)
    assert (again.tokens, again.before, again.factor) == (TOKENS, TOKENS, None)
    assert_same(rotary_state(loaded), rotary_state(made(name, by_hand=True)))


@pytest.mark.parametrize("when", ["before", "after", "LoRA"])
@pytest.mark.parametrize("name", ["Llama 3", "Qwen3", "Mistral", "Gemma 2", "Gemma 3", "ntk"])
def test_gradients_stay_exact(name: str, when: str) -> None:
    """Longer than the model was made for, in chunks, against the plain model of the config by hand."""
    model, plain = (norms_in_fp64(made(name, by_hand=by_hand)) for by_hand in (False, True))
    config = ChunkConfig(chunk_size=16, attention="math")
    if when == "before":
        extended(name, model)
    if when == "LoRA":
        model, plain = with_lora(model), with_lora(plain)  # type: ignore[assignment]
    chunk_model(model, config)
    if when != "before":
        extended(name, model)
    inputs = batch(num_tokens=90) if name == "ntk" else packed_batch([70, 5, 30])
    assert largest_difference(gradients(model, inputs), gradients(plain, inputs)) < 1e-10
    unchunk_model(model)
    assert largest_difference(gradients(model, inputs), gradients(plain, inputs)) < 1e-10


def test_a_model_inside_another() -> None:
    """The text model's config is a part of the whole's, which is what is saved."""
    text = {**SIZES, **WINDOW}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 14, "patch_size": 7}

    def whole(**values: Any) -> Any:
        torch.manual_seed(0)
        config = Gemma3Config(text_config={**text, **values}, vision_config=vision, mm_tokens_per_image=1)
        config.text_config.pad_token_id = 0
        return Gemma3ForConditionalGeneration(config).double()

    model = whole()
    extend_context(chunk_model(model, ChunkConfig(chunk_size=16)), TOKENS)
    expected = whole(rope_parameters=copy.deepcopy(GEMMA3), max_position_embeddings=TOKENS)
    assert model.config.to_dict() == expected.config.to_dict()
    assert_same(rotary_state(model), rotary_state(expected))


def test_what_else_depends_on_the_recipe() -> None:
    """DeepSeek's attention is scaled by YaRN's factor, too."""
    sizes = {
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    }
    sizes |= {"first_k_dense_replace": 2, "moe_intermediate_size": 16, "n_routed_experts": 4, "n_group": 1}
    sizes |= {"num_key_value_heads": 4, "num_experts_per_tok": 2, "topk_group": 1}

    def model(length: int, factor: float) -> Any:
        yarn = rope(1e4, rope_type="yarn", factor=factor, original_max_position_embeddings=8)
        yarn |= {"mscale": 1.0, "mscale_all_dim": 1.0}
        config = DeepseekV3Config(
            **{**SIZES, **sizes, "max_position_embeddings": length, "rope_parameters": yarn}
        )
        return AutoModelForCausalLM.from_config(config)

    extended_one, expected = model(BEFORE, 4.0), model(TOKENS, 16.0)
    before = extended_one.model.layers[0].self_attn.scaling
    extend_context(extended_one, TOKENS)
    assert (
        extended_one.model.layers[0].self_attn.scaling == expected.model.layers[0].self_attn.scaling > before
    )
    assert_same(rotary_state(extended_one), rotary_state(expected))


def test_none_names_the_length_alone() -> None:
    model = made("Llama 3", by_hand=False)
    before = rotary_state(model)
    done = extend_context(model, TOKENS, recipe="none")
    assert (done.recipe, done.factor, model.config.max_position_embeddings) == ("none", None, TOKENS)
    changed = {"model.rotary_emb.max_seq_len_cached", "model.rotary_emb.original_max_seq_len"}
    after = rotary_state(model)
    assert_same(*({k: x for k, x in state.items() if k not in changed} for state in (after, before)))
    scaled = made("linear", by_hand=True)
    extend_context(scaled, 2 * TOKENS, recipe="none")
    assert made_for(scaled.config) == 2 * TOKENS
    assert scaled.config.rope_parameters["factor"] == 4.0


LLAMA31 = rope(5e5, **{**LLAMA3, "factor": 8.0, "original_max_position_embeddings": 8192})
QWEN_YARN = rope(1e6, rope_type="yarn", factor=4.0, original_max_position_embeddings=32768)


@pytest.mark.parametrize(
    ("config", "tokens", "expected"),
    [
        # Model cards have these numbers.
        (Qwen3Config(max_position_embeddings=40960), 131072, ("yarn", 4.0, 32768, 131072)),
        (Qwen2Config(max_position_embeddings=32768), 131072, ("yarn", 4.0, 32768, 131072)),
        # These go on with what they have; Qwen's cards leave max_position_embeddings as it was.
        (
            LlamaConfig(max_position_embeddings=131072, rope_parameters=LLAMA31),
            262144,
            ("llama3", 16.0, 8192, 262144),
        ),
        (
            Qwen2Config(max_position_embeddings=32768, rope_parameters=QWEN_YARN),
            262144,
            ("yarn", 8.0, 32768, 262144),
        ),
    ],
)
def test_published_configs(config: Any, tokens: int, expected: tuple[Any, ...]) -> None:
    plan = plan_context(config, tokens, "auto", name="model")
    assert plan is not None
    parameters = plan.rope_parameters
    found = (plan.recipe, parameters["factor"], parameters["original_max_position_embeddings"])
    assert (*found, plan.max_position_embeddings) == expected


@pytest.mark.parametrize("name", ["afmoe", "cohere2", "exaone4", "exaone_moe", "flint", "kolibri1"])
def test_windows_bound_the_distances_of_all_rotary_layers(name: str) -> None:
    config = AutoConfig.for_model(name, max_position_embeddings=BEFORE, sliding_window=8)
    plan = plan_context(config, TOKENS, "auto", name="model")
    assert plan is not None
    assert (plan.recipe, plan.rope_parameters) == ("none", config.rope_parameters)


def test_refused() -> None:
    gpt2 = GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=1, n_positions=BEFORE)
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    phi3 = Phi3Config(
        **{**SIZES, "max_position_embeddings": 64},
        original_max_position_embeddings=BEFORE,
        rope_parameters=rope(1e4, rope_type="longrope", **factors),
    )
    by_hand = {"rope_parameters": rope(1e4, rope_type="yarn", attention_factor=1.1, **SCALED)}
    of = AutoModelForCausalLM.from_config
    wrong, unsupported = ValueError, UnsupportedModelError
    cases: list[tuple[Any, str, type[ValueError], str]] = [
        (of(gpt2), "auto", unsupported, "GPT2LMHeadModel has no rotary embedding to scale"),
        (tiny_model("GraniteSWAForCausalLM"), "auto", unsupported, "of copies of its config"),
        (of(phi3), "auto", unsupported, "rope_type=longrope in layers without a window, and no rule"),
        (of(phi3), "none", unsupported, "rope_type=longrope"),
        (made("Llama 3.1", by_hand=False), "yarn", wrong, "is scaled by llama3 already"),
        (made("Gemma 3", by_hand=False), "ntk", wrong, "rotary parameters by kind of layer"),
        (made("ntk", by_hand=True), "none", wrong, "rope_type=dynamic, whose frequencies follow"),
        (made("Llama 2", by_hand=False), "longrope", wrong, "write one of auto, yarn, linear, ntk, none"),
        (made("Llama 2", by_hand=False, **by_hand), "auto", unsupported, "attention_factor=1.1, set by hand"),
    ]
    for model, recipe, kind, message in cases:
        config, state = model.config.to_dict(), copy.deepcopy(rotary_state(model))
        with pytest.raises(kind, match=message):
            extend_context(model, 100_000, recipe=recipe)
        assert model.config.to_dict() == config
        assert_same({"": 0, **rotary_state(model)}, {"": 0, **state})


def test_a_failure_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("Qwen3", by_hand=False)
    config, state = model.config.to_dict(), rotary_state(model)

    def fail(*_: Any) -> None:
        raise ArithmeticError("planted")

    monkeypatch.setattr(extend, "_made_anew", fail)
    with pytest.raises(ArithmeticError, match="planted"):
        extended("Qwen3", model)
    assert model.config.to_dict() == config
    assert_same(rotary_state(model), state)
