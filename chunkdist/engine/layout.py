"""Rows in, one stream inside, rows out: what a decoder is called with, and what it returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from chunkdist.engine.parts import Parts
from chunkdist.errors import UnsupportedModelError
from chunkdist.models.arguments import SEGMENT_ARGUMENTS
from chunkdist.stream.layout import Layout
from chunkdist.stream.padding import refuse_gradients_of_padding

_OF_ROWS = frozenset(("attention_mask", "position_ids", "cache_position", *SEGMENT_ARGUMENTS))
"""Arguments that say where in their rows tokens are."""


@dataclass(frozen=True)
class DecoderCall:
    """One call of a decoder.

    Args:
        args, kwargs: What it is called with.
        layout: How the caller's rows became the stream; `None`: they are it.
        mask: (B, T), 0 where they are padding; `None`: there is none.
        parts: One rank's part of them, where ranks share rows.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    layout: Layout | None = None
    mask: Tensor | None = None
    parts: Parts | None = None

    def finish(self, output: Any) -> Any:
        """What the decoder returned, in the caller's rows."""
        if self.parts is not None:
            return self.parts.restored(output)
        return output if self.layout is None else self._in_rows(output, self.layout)

    def _in_rows(self, output: Any, layout: Layout) -> Any:
        if isinstance(output, Tensor):
            if output.shape[:2] == (1, layout.num_tokens):
                return _scatter(output[0], layout).unflatten(0, layout.shape)
            if output.ndim == 2 and output.shape[0] == layout.num_tokens:  # router logits
                rows = _scatter(output, layout)
                if self.mask is not None:
                    refuse_gradients_of_padding(rows, self.mask)
                return rows
            return output
        if isinstance(output, dict):
            return type(output)(**{key: self._in_rows(x, layout) for key, x in output.items()})
        if isinstance(output, (tuple, list)):
            return type(output)(self._in_rows(x, layout) for x in output)
        return output


class ReadInside(Exception):
    """Rows become a stream in the module inside of the decoder, which is called with embeddings of images in
    their places. The message says why not before."""


def why_with_images(arguments: dict[str, Any]) -> str | None:
    """Why rows must stay rows, and are compared with no others: some of their tokens stand for images, or
    sounds, which the decoder puts into their places itself. `None`: they may become a stream."""
    tokens = next((x for x in map(arguments.get, ("inputs_embeds", "input_ids")) if x is not None), None)
    for name, x in arguments.items():
        is_data = isinstance(x, Tensor) and x.is_floating_point() and x.ndim > 1
        if isinstance(x, dict) and x:
            return f"{name} is not cut by tokens"
        if is_data and tokens is not None and x.shape[:2] != tokens.shape[:2]:
            return f"{name} is not cut by tokens"
    return None


def in_stream(arguments: dict[str, Any], layout: Layout, mask: Tensor | None) -> DecoderCall:
    """A decoder's call with rows (B, T), as one with their stream (1, U).

    Raises:
        UnsupportedModelError: an argument's dims do not tell its tokens.
    """
    positions = arguments.get("position_ids")
    kwargs = {
        key: _gather(key, x, layout) if isinstance(x, Tensor) else x
        for key, x in arguments.items()
        if key not in _OF_ROWS
    }
    kwargs["position_ids"] = layout.positions[None]
    if isinstance(positions, Tensor):
        rows = torch.atleast_2d(positions)
        flat = rows.expand(*rows.shape[:-2], *layout.shape).flatten(-2)
        kwargs["position_ids"] = flat.index_select(-1, layout.sources.to(flat.device))[..., None, :]
    return DecoderCall((), kwargs, layout, mask)


def _gather(key: str, x: Tensor, layout: Layout) -> Tensor:
    """(B, T, ...) to (1, U, ...)."""
    num_rows, num_tokens = layout.shape
    if x.shape[:2] == layout.shape:
        return x.flatten(0, 1).index_select(0, layout.sources.to(x.device))[None]
    is_of_rows = x.ndim > 0 and x.shape[0] == num_rows > 1
    if is_of_rows or num_tokens in x.shape or num_rows * num_tokens in x.shape:
        _refuse(key, x, layout)
    return x


def _refuse(key: str, x: Tensor, layout: Layout) -> NoReturn:
    raise UnsupportedModelError(
        f"the decoder gets {key} of shape {tuple(x.shape)} with rows of shape {layout.shape} that have "
        "padding or share their beginnings: cannot tell which of its numbers belong to which token; pass "
        "rows without padding, with share_prefixes=False"
    )


def _scatter(x: Tensor, layout: Layout) -> Tensor:
    """(U, ...) to (B x T, ...)."""
    return x.index_select(0, layout.places.to(x.device))
