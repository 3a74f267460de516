"""What a model's attention masks say, read from the functions they would be made of, without making one.

transformers builds every mask from a function of two token indices, composed of a few known ones (causal,
window, blocks, segments of a packed stream), and asks the attention implementation to make a tensor of it.
Ours makes a `ChunkMask`: a note that the decoder hands to its layers, and they to the attention. A layer's
mask, and not its config, is the truth about what it sees; what is not understood is refused where it is used.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from transformers import masking_utils

from chunkdist.errors import UnsupportedModelError


@dataclass(frozen=True, kw_only=True)
class ChunkMask:
    """A causal mask within segments, told in words. A model that computes with it is refused.

    Args:
        window: Number of tokens a query sees, itself included; `None`: all before it.
        block: Length of the blocks, counted from the start of a segment, in which attention stays; or `None`.
        unsupported: What else there is to it, or `None`.
    """

    window: int | None = None
    block: int | None = None
    unsupported: str | None = None

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        raise UnsupportedModelError(
            f"the model computes with its attention mask (.{name}), and chunks have none"
        )

    def __getitem__(self, index: object) -> NoReturn:
        raise UnsupportedModelError("the model cuts its attention mask, and chunks have none")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        name = getattr(func, "__name__", func)
        raise UnsupportedModelError(
            f"the model computes with its attention mask ({name}), and chunks have none"
        )


def chunk_mask(
    *, mask_function: Callable[..., Any], q_length: int, kv_length: int, q_offset: Any = 0, **kwargs: Any
) -> ChunkMask:
    """The mask function for transformers' `AttentionMaskInterface`. Right padding is no part of it."""
    if q_length != kv_length or isinstance(q_offset, Tensor) or q_offset != 0:
        return ChunkMask(unsupported=f"it is for {q_length} queries and {kv_length} keys")
    mask, is_causal = _read(mask_function)
    if mask.unsupported is None and not is_causal:
        return replace(mask, unsupported="it shows later tokens")
    return mask


def _read(function: Any) -> tuple[ChunkMask, bool]:
    """What a mask function says, and whether it hides all later tokens."""
    if inspect.isfunction(function) and function.__module__ == masking_utils.__name__:
        inside = inspect.getclosurevars(function).nonlocals
        match _name_of(function):
            case "causal_mask_function":
                return ChunkMask(), True
            case "sliding_window_overlay":
                return ChunkMask(window=int(inside["sliding_window"])), False
            case "chunked_overlay":
                return ChunkMask(block=int(inside["chunk_size"])), False
            case "packed_sequence_mask_function" | "bidirectional_mask_function":
                return ChunkMask(), False
            case "remap_positions_for_packed_sequence":
                return _read(inside["mask_function"])
            case "and_masks":
                return _all_of([_read(part) for part in inside["mask_functions"]])
            case "or_masks":
                parts = [part for part in inside["mask_functions"] if not _shows_nothing(part)]
                if len(parts) == 1:
                    return _read(parts[0])
                if any(_name_of(part) == "blockwise_overlay" for part in parts):
                    return ChunkMask(unsupported="tokens of one image see each other both ways"), False
    return ChunkMask(unsupported=f"it is more than causal, windowed and packed ({_name_of(function)})"), False


def _name_of(function: Any) -> str:
    """The name of what has made a mask function."""
    name: str = getattr(function, "__qualname__", type(function).__name__)
    return name.partition(".")[0]


def _all_of(parts: list[tuple[ChunkMask, bool]]) -> tuple[ChunkMask, bool]:
    masks = [mask for mask, _ in parts]
    windows = [mask.window for mask in masks if mask.window is not None]
    blocks = {mask.block for mask in masks if mask.block is not None}
    unsupported = next((mask.unsupported for mask in masks if mask.unsupported is not None), None)
    if len(blocks) > 1:
        unsupported = f"it has blocks of several lengths ({blocks})"
    mask = ChunkMask(
        window=min(windows, default=None), block=next(iter(blocks), None), unsupported=unsupported
    )
    return mask, any(is_causal for _, is_causal in parts)


def _shows_nothing(function: Any) -> bool:
    """Whether this is the overlay for image tokens that see each other, and there are none."""
    if not inspect.isfunction(function) or function.__module__ != masking_utils.__name__:
        return False
    ids = inspect.getclosurevars(function).nonlocals.get("block_sequence_ids")
    return isinstance(ids, Tensor) and not isinstance(ids, FakeTensor) and not bool((ids >= 0).any())
