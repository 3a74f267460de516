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
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise UnsupportedModelError(
            f"{name} takes no position_ids: positions of sequences in one row would run on from one to the "
            "next; pass them one at a time (chunk_packing: false)"
        )
    config: Any = model.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    for rope in _ropes(getattr(config, "rope_parameters", None)):
        kind = rope.get("rope_type", "default")
        limit = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        if (kind == "longrope" or "dynamic" in kind) and longest > limit:
            raise UnsupportedModelError(
                f"{name} has rope_type={kind}: its frequencies depend on a row's longest sequence, where "
                f"that has more than {limit} tokens, and one here has {longest}: pass sequences one by one "
                f"(chunk_packing: false), or none longer than {limit} (max_length)"
            )


def _ropes(parameters: Any) -> Iterator[Mapping[str, Any]]:
    """Rotary parameters of all layers, or by kind of layer."""
    if not isinstance(parameters, Mapping):
        return
    if any(isinstance(value, Mapping) for value in parameters.values()):
        for value in parameters.values():
            yield from _ropes(value)
    else:
        yield parameters
