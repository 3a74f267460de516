"""Reads the stream of a forward from what the caller passed: rows, tokens, padding, segments.

Read once a step, so a GPU waits at most once, and not at all without attention_mask, position_ids and
cu_seq_lens_q.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from chunkdist.stream.stream import Stream, cut, cut_segments


def read_stream(arguments: dict[str, Any], chunk_size: int, *, cut_at_segments: bool = False) -> Stream:
    """The stream of a decoder's arguments.

    Segments come from `cu_seq_lens_q` (N + 1,), or from `position_ids` (B, T) that do not go on by one, as in
    transformers' packing; with an `attention_mask` (B, T) rows are padded, not packed.

    Args:
        cut_at_segments: Chunks end where segments do, too.

    Raises:
        ValueError: left padding, or a mask of another shape; `seq_idx` with other segments; several rows with
            different segments, where chunks end where segments do.
    """
    ids, embeddings = arguments.get("input_ids"), arguments.get("inputs_embeds")
    tokens = embeddings if ids is None else ids
    if tokens is None:
        raise ValueError("neither input_ids nor inputs_embeds were passed")
    num_rows, num_tokens = tokens.shape[:2]
    if num_tokens == 0:
        raise ValueError("input_ids have no tokens: pass at least one")
    mask = arguments.get("attention_mask")
    if mask is not None:
        _refuse_mask(mask, num_tokens)
    starts: tuple[tuple[int, ...], ...] = ((0,),) * num_rows
    cu_seq_lens, position_ids = arguments.get("cu_seq_lens_q"), arguments.get("position_ids")
    if cu_seq_lens is not None and not isinstance(cu_seq_lens, FakeTensor):
        starts = _starts_from_lengths(cu_seq_lens, num_rows, num_tokens)
    elif position_ids is not None and mask is None and not isinstance(position_ids, FakeTensor):
        starts = _starts_from_positions(position_ids, num_rows)
    seq_idx = arguments.get("seq_idx")
    if isinstance(seq_idx, Tensor) and not isinstance(seq_idx, FakeTensor):
        _check_sequence_numbers(seq_idx, starts)
    if not cut_at_segments:
        return Stream(num_tokens=num_tokens, chunks=cut(num_tokens, chunk_size), segment_starts=starts)
    if len(set(starts)) > 1:
        raise ValueError(
            f"{num_rows} rows were passed whose packed sequences begin at different tokens: a model with "
            "state between tokens needs one row, with all sequences one after another in it"
        )
    return Stream(
        num_tokens=num_tokens,
        chunks=cut_segments(starts[0], num_tokens, chunk_size),
        segment_starts=starts,
    )


def _refuse_mask(mask: object, num_tokens: int) -> None:
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[1] != num_tokens:
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"attention_mask {shape} is not (rows, {num_tokens} tokens): chunked models take right padding, "
            "and packed segments by position_ids; leave custom masks out"
        )
    if isinstance(mask, FakeTensor):
        return
    rises = (mask[:, 1:] != 0) & (mask[:, :-1] == 0)
    if bool(rises.any()):
        raise ValueError(
            "attention_mask has left padding or a gap, and chunks run from the left: set padding_side='right'"
        )


def _starts_from_lengths(cu_seq_lens: Tensor, num_rows: int, num_tokens: int) -> tuple[tuple[int, ...], ...]:
    bounds = cu_seq_lens.tolist()
    if num_rows != 1 or bounds[0] != 0 or bounds[-1] != num_tokens or bounds != sorted(bounds):
        raise ValueError(
            f"cu_seq_lens_q {bounds[:3]}...{bounds[-1:]} does not cut one row of {num_tokens} tokens, but "
            f"{num_rows} row(s) were passed: it must ascend from 0 to {num_tokens}"
        )
    return (tuple(sorted(set(bounds[:-1]) - {num_tokens})),)


def _starts_from_positions(position_ids: Tensor, num_rows: int) -> tuple[tuple[int, ...], ...]:
    if (
        position_ids.ndim == 3
    ):  # a plane for each rotary axis, after one of plain positions, if there are four
        if position_ids.shape[0] != 4:
            return ((0,),) * num_rows
        position_ids = position_ids[0]
    starts = _starts_from_breaks(torch.diff(position_ids, dim=-1) != 1)
    return starts * num_rows if len(starts) == 1 else starts


def _starts_from_breaks(breaks_BT: Tensor) -> tuple[tuple[int, ...], ...]:
    """(B, T - 1): whether a sequence ends after a token."""
    rows: list[list[int]] = [[0] for _ in range(breaks_BT.shape[0])]
    for row, before in breaks_BT.nonzero().tolist():
        rows[row].append(before + 1)
    return tuple(tuple(row) for row in rows)


def _check_sequence_numbers(seq_idx: Tensor, starts: tuple[tuple[int, ...], ...]) -> None:
    """Kernels of some layers with state tell sequences apart by `seq_idx`, and attention does not."""
    found = _starts_from_breaks(torch.diff(seq_idx, dim=-1) != 0)
    if found != starts and found * len(starts) != starts:
        raise ValueError(
            f"seq_idx says that the first row's sequences begin at {found[0]}, position_ids or cu_seq_lens_q "
            f"say {starts[0]}: pass position_ids that start again with each sequence"
        )
