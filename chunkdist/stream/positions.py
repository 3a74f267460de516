"""Where tokens are in their own sequences, read from what a decoder is called with, without a wait for the
device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def positions_in_sequences(
    arguments: Mapping[str, Any], shape: tuple[int, int], device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Positions (B, T) of tokens within their own sequences, and the mask (B, T) of tokens that are no
    padding; `None`: there is none. Padding has some position.

    Args:
        arguments: Of a decoder's forward, by name.
        shape: (B, T).
    """
    along_T = torch.arange(shape[1], device=device)
    mask, cu_seq_lens = arguments.get("attention_mask"), arguments.get("cu_seq_lens_q")
    position_ids = arguments.get("position_ids")
    if isinstance(mask, Tensor) and mask.shape == shape:  # padded rows are not packed
        return ((mask != 0).to(torch.int64).cumsum(-1) - 1).clamp(min=0), mask
    if isinstance(cu_seq_lens, Tensor):
        segment_T = torch.searchsorted(cu_seq_lens[1:].contiguous(), along_T, right=True)
        return (along_T - cu_seq_lens[segment_T]).expand(shape), None
    if isinstance(position_ids, Tensor):
        if position_ids.ndim == 3:  # a plane a rotary axis, after one of plain positions if there are four
            position_ids = position_ids[0] if position_ids.shape[0] == 4 else along_T
        if position_ids.shape[-1] == shape[1]:
            return position_ids.expand(shape), None
    return along_T.expand(shape), None
