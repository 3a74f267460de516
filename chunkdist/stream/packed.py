"""Which models can take several sequences in one row, each as if it were alone."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from chunkdist.errors import UnsupportedModelError


def refuse_segments(model: nn.Module, longest: int) -> None:
    """Refuses packed rows that would not give what their sequences give one at a time.

    Args:
        model: Takes the rows; with a transformers config.
        longest: Tokens of the longest sequence.

    Raises:
        UnsupportedModelError: the model numbers its positions itself, or its rotary frequencies depend on the
            longest position in the row.
    """
    name = type(model).__name__
    if not _takes_positions(model):
        raise UnsupportedModelError(
            f"{name} takes no position_ids: positions of sequences in one row would run on from one to the "
            "next; pass them one at a time (chunk_packing: false)"
        )
    for kind, limit in _limits(model):
        if longest > limit:
            raise UnsupportedModelError(
                f"{name} has rope_type={kind}: its frequencies depend on a row's longest sequence, where "
                f"that has more than {limit} tokens, and one here has {longest}: pass sequences one by one "
                f"(chunk_packing: false), or none longer than {limit} (max_length)"
            )


def why_rows(model: nn.Module, num_tokens: int, *, has_positions: bool) -> str | None:
    """Why rows of `num_tokens` tokens, padding included, cannot become one stream; `None`: they can.

    Args:
        has_positions: Whether the caller passed position_ids. Else a stream passes them, counted from 0;
            where they are not rotary, the model may count from elsewhere (RoBERTa: from its padding_idx).
    """
    name = type(model).__name__
    if not has_positions and not rope_parameters(model):
        return f"{name} has no rotary embedding, and numbers its positions itself: pass position_ids"
    if not _takes_positions(model):
        return f"{name} takes no position_ids, which would say where sequences begin"
    for kind, limit in _limits(model):
        if num_tokens > limit:
            return f"{name} has rope_type={kind}, whose frequencies depend on the row's length, padding too"
    return None


def why_right_padding(model: nn.Module, num_tokens: int, *, has_positions: bool) -> str | None:
    """Why rows with padding need it on the right; `None`: it may be on the left.

    Args:
        has_positions: Whether the caller passed position_ids.
    """
    if has_positions or rope_parameters(model):
        return why_rows(model, num_tokens, has_positions=has_positions)
    return (
        f"{type(model).__name__} has no rotary embedding, so its positions would count the padding: pass "
        "position_ids=(attention_mask.cumsum(-1) - 1).clamp(min=0)"
    )


def _takes_positions(model: nn.Module) -> bool:
    return "position_ids" in inspect.signature(model.forward).parameters


def rope_parameters(model: nn.Module) -> Any:
    """Of the text model's rotary embedding, as its config has them; `None`: it has none."""
    config: Any = model.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(config, "rope_parameters", None)


def _limits(model: nn.Module) -> Iterator[tuple[str, int]]:
    """Kinds of rotary embedding that depend on the longest sequence, each with the length up to which they
    do not."""
    config: Any = model.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    for rope in _ropes(rope_parameters(model)):
        kind = rope.get("rope_type", "default")
        if kind == "longrope" or "dynamic" in kind:
            yield kind, rope.get("original_max_position_embeddings") or config.max_position_embeddings


def _ropes(parameters: Any) -> Iterator[Mapping[str, Any]]:
    """Rotary parameters of all layers, or by kind of layer."""
    if not isinstance(parameters, Mapping):
        return
    if any(isinstance(value, Mapping) for value in parameters.values()):
        for value in parameters.values():
            yield from _ropes(value)
    else:
        yield parameters
