"""How many tokens a model was made for, and what its config says when it is set up for more.

A rotary embedding turns queries and keys by angles that grow with the position. Angles that a model has not
met in training mean nothing to it; so frequencies are scaled down: all of them (linear, or position
interpolation, arXiv 2306.15595), mostly the low ones (YaRN, arXiv 2309.00071; Llama 3, arXiv 2407.21783), or
by the length of the sequence at hand (NTK, "dynamic"). Here is the arithmetic of configs; transformers makes
frequencies of them (5.23, `modeling_rope_utils`).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal, get_args

from chunkdist.errors import UnsupportedModelError

Recipe = Literal["auto", "yarn", "linear", "ntk", "none"]

_BY_WINDOW = ("sliding_attention", "chunked_attention")
"""Kinds of layers whose distances a window bounds: they stay as they are."""
_WINDOW_ONLY = ("afmoe", "cohere2", "exaone4", "exaone_moe", "flint", "kolibri1")
"""With a window, only layers that have it have rotary embeddings."""
_CAN_GROW = ("default", "yarn", "linear", "llama3", "dynamic")
_LLAMA3_THETA = 500_000
"""From this base on, a Llama is of the third generation, or trained as it was."""
_QWEN3_RESERVED, _QWEN3_TRAINED = 40_960, 32_768
"""Qwen3's config counts 8,192 tokens of prompts beside the 32,768 that it was trained on (model card)."""


@dataclass(frozen=True, kw_only=True)
class ContextPlan:
    """What a text config is to say.

    Args:
        tokens: The context length.
        before: What the model was made for.
        recipe: transformers' `rope_type`, or "none": frequencies stay.
        rope_parameters: All of them, by kind of layer where the config has them so.
        max_position_embeddings: As transformers and vLLM read it: with linear and dynamic scaling the length
            before it (but for Gemma 3), else the new one.
        why: In words.
    """

    tokens: int
    before: int
    recipe: str
    rope_parameters: dict[str, Any]
    max_position_embeddings: int
    why: str


def made_for(config: Any) -> int | None:
    """Tokens of the longest sequence that a model was made for; `None`: its config does not say.

    Args:
        config: Of the text model.
    """
    length: int | None = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None)
    if length is None or not rope or _names_whole_length(config):
        return length
    return max([length, *(_reach(part, length) for part in _scaled_parts(rope).values())])


def _names_whole_length(config: Any) -> bool:
    """Whether `max_position_embeddings` is the length after linear scaling, not before it."""
    return bool(config.model_type.startswith("gemma3"))


def _reach(rope: dict[str, Any], length: int) -> int:
    kind, factor = rope.get("rope_type", "default"), rope.get("factor") or 1
    if kind in ("linear", "dynamic"):
        return round(length * factor)
    return round(rope["original_max_position_embeddings"] * factor) if kind == "yarn" else length


def plan_context(config: Any, tokens: int, recipe: Recipe | str, *, name: str) -> ContextPlan | None:
    """What the config of a text model is to say for sequences of `tokens`; `None`: it was made for them.

    Args:
        name: Of the model, for messages.

    Raises:
        ValueError: `recipe` is none, or does not fit what the model has.
        UnsupportedModelError: no recipe fits.
    """
    if recipe not in get_args(Recipe):
        raise ValueError(f"rope_extension={recipe!r}: write one of {', '.join(get_args(Recipe))}")
    rope, before = getattr(config, "rope_parameters", None), made_for(config)
    if not rope or before is None:
        raise UnsupportedModelError(
            f"context_length={tokens}, but {name} has no rotary embedding to scale: its positions are "
            "learned, or it has none; leave context_length out, or take a model with rotary embeddings"
        )
    if tokens <= before:
        return None
    parts = _scaled_parts(rope)
    kinds = sorted({part.get("rope_type", "default") for part in parts.values()})
    if len(kinds) != 1 or (kinds[0] not in _CAN_GROW and (recipe != "none" or kinds[0] == "longrope")):
        raise UnsupportedModelError(
            f"context_length={tokens}, but {name} has rope_type={' and '.join(kinds) or 'none'} in layers "
            f"without a window, and no rule makes its factors for more than {before:,} tokens: take a "
            "max_length up to that, or another model"
        )
    (kind,) = kinds
    chosen, why = _choose(config, kind, recipe, name)
    is_flat = "" in parts
    if chosen == "dynamic" and not is_flat:
        raise ValueError(
            f"rope_extension={recipe!r}, but {name} has rotary parameters by kind of layer, which all share "
            "the length of its config, and these frequencies follow it: write auto"
        )
    keeps_length = chosen == "dynamic" or (chosen == "linear" and not _names_whole_length(config))
    length = config.max_position_embeddings if keeps_length else tokens
    if chosen == "none":
        scaled, is_short = parts, kind == "linear" and not _names_whole_length(config)
        length = round(tokens / parts[""]["factor"]) if is_short and is_flat else tokens
    else:
        scaled = {key: _scaled(config, part, chosen, tokens, before) for key, part in parts.items()}
    return ContextPlan(
        tokens=tokens,
        before=before,
        recipe=chosen,
        rope_parameters=copy.deepcopy(scaled[""] if is_flat else {**rope, **scaled}),
        max_position_embeddings=length,
        why=why,
    )


def _choose(config: Any, kind: str, recipe: str, name: str) -> tuple[str, str]:
    """transformers' name of the recipe, and why it is taken.

    Args:
        kind: What the model has.
    """
    if recipe == "none":
        if kind == "dynamic":
            raise ValueError(
                f"rope_extension='none', but {name} has rope_type=dynamic, whose frequencies follow the "
                "length that its config names: write rope_extension: auto"
            )
        return "none", "frequencies stay: training alone is to teach the new positions"
    wanted = {"ntk": "dynamic"}.get(recipe, recipe)
    if kind != "default":
        if wanted not in ("auto", kind):
            raise ValueError(
                f"rope_extension={recipe!r}, but {name} is scaled by {kind} already, and was trained with "
                "that: write rope_extension: auto, which goes on with it, or none"
            )
        return kind, "goes on with what the model has"
    if wanted != "auto":
        return wanted, "as configured"
    family = config.model_type
    if family in _WINDOW_ONLY and config.sliding_window is not None:
        return "none", "only layers with a window have rotary embeddings, and a window bounds distances"
    if family == "llama" and _theta(config) >= _LLAMA3_THETA:
        return "llama3", "Llama 3.1's"
    if family.startswith("gemma3"):
        return "linear", "Gemma 3's, of its global layers"
    own = {"qwen": "Qwen's", "llama": "YaRN's own for Llama 2", "mistral": "YaRN's own for Mistral"}
    return "yarn", next((text for start, text in own.items() if family.startswith(start)), "most families'")


def _scaled(config: Any, rope: dict[str, Any], kind: str, tokens: int, before: int) -> dict[str, Any]:
    """The rotary parameters of one kind of layer, scaled from `before` to `tokens`.

    Raises:
        UnsupportedModelError: something was set by hand for another factor.
    """
    if rope.get("attention_factor") is not None:
        raise UnsupportedModelError(
            f"context_length={tokens}, but rope_parameters has attention_factor={rope['attention_factor']}, "
            "set by hand for another length: set rope_parameters by hand, or leave context_length out"
        )
    is_scaled, grown = rope.get("rope_type", "default") != "default", tokens / before
    original = rope.get("original_max_position_embeddings") if is_scaled else None
    original = original or _trained_on(config)
    result = {**rope, "rope_type": kind}
    if kind == "dynamic":
        return {**result, "factor": tokens / config.max_position_embeddings}
    if kind == "linear":
        # Gemma 3 (arXiv 2503.19786, section 2.1): factor 8 for four times the length
        first = 2 * grown if _names_whole_length(config) else grown
        return {**result, "factor": rope["factor"] * grown if is_scaled else first}
    result |= {"factor": tokens / original, "original_max_position_embeddings": original}
    if kind == "llama3":
        result |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if not is_scaled else {}
        result["factor"] = rope["factor"] * grown if is_scaled else tokens / original
    return result


def _trained_on(config: Any) -> int:
    length: int = config.max_position_embeddings
    is_qwen3 = config.model_type.startswith("qwen3") and length == _QWEN3_RESERVED
    return _QWEN3_TRAINED if is_qwen3 else length


def _theta(config: Any) -> float:
    return float(config.rope_parameters.get("rope_theta") or 0)


def _is_nested(rope: dict[str, Any]) -> bool:
    """Whether there are parameters for each kind of layer."""
    return any(isinstance(value, dict) for value in rope.values())


def _scaled_parts(rope: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The parameters of layers that see the whole sequence, by kind of layer; under `""` where there is one
    set."""
    if not _is_nested(rope):
        return {"": rope}
    return {key: value for key, value in rope.items() if isinstance(value, dict) and key not in _BY_WINDOW}
