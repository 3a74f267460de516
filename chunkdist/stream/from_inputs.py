"""Reads the stream of a forward from what the caller passed: rows, tokens, padding, segments.

Read once a step, so a GPU waits at most once, and not at all without attention_mask, position_ids and
cu_seq_lens_q.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from chunkdist.stream.padding import ForwardLabels
from chunkdist.stream.stream import Stream, cut, cut_segments


def read_stream(
    arguments: dict[str, Any],
    chunk_size: int,
    *,
    cut_at_segments: bool = False,
    labels: ForwardLabels | None = None,
) -> Stream:
    """The stream of a decoder's arguments.

    Segments come from `cu_seq_lens_q` (N + 1,), or from `position_ids` (B, T) that do not go on by one, as in
    transformers' packing; with an `attention_mask` (B, T) rows are padded, not packed.

    Args:
        cut_at_segments: Chunks end where segments do, too.
        labels: The forward's labels; `None`: not known.

    Raises:
        ValueError: left padding, or a mask of another shape; labels of padding; positions that do not begin
        at 0;
            `seq_idx` with other segments; several rows with different segments, where chunks end where
            segments do.
    """
    ids, embeddings = arguments.get("input_ids"), arguments.get("inputs_embeds")
    tokens = embeddings if ids is None else ids
    if tokens is None:
        raise ValueError("neither input_ids nor inputs_embeds were passed")
    num_rows, num_tokens = tokens.shape[:2]
    if num_tokens == 0:
        raise ValueError("input_ids have no tokens: pass at least one")
    mask = arguments.get("attention_mask")
    is_part, labels = _is_part(arguments), labels or ForwardLabels()
    labels.mask = None
    if mask is not None:
        _refuse_mask(mask, is_part, num_tokens, labels)
    starts: tuple[tuple[int, ...], ...] = ((0,),) * num_rows
    cu_seq_lens, position_ids = arguments.get("cu_seq_lens_q"), arguments.get("position_ids")
    if cu_seq_lens is not None and not isinstance(cu_seq_lens, FakeTensor):
        starts = _starts_from_lengths(cu_seq_lens, is_part, num_rows, num_tokens)
    elif position_ids is not None and mask is None and not isinstance(position_ids, FakeTensor):
        assert is_part is not None
        starts = _starts_from_positions(position_ids, is_part, num_rows)
    elif is_part is not None and mask is None and bool(is_part.any()):
        _refuse_part()
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


def _refuse_mask(mask: object, is_part: Tensor | None, num_tokens: int, labels: ForwardLabels) -> None:
    """Raises on masks that cannot be chunked, on labels of padding, and on positions of a sequence's part."""
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[1] != num_tokens:
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"attention_mask {shape} is not (rows, {num_tokens} tokens): chunked models take right padding, "
            "and packed segments by position_ids; leave custom masks out"
        )
    if isinstance(mask, FakeTensor):
        return
    rises = (mask[:, 1:] != 0) & (mask[:, :-1] == 0)
    facts = [rises.any(), labels.on_padding(mask), (mask == 0).any()]
    facts += [] if is_part is None else [is_part.any().to(mask.device)]
    has_gap, has_labels, has_padding, *begins_later = torch.stack(facts).tolist()  # one wait
    if has_gap:
        raise ValueError(
            "attention_mask has left padding or a gap, and chunks run from the left: set padding_side='right'"
        )
    if has_labels:
        labels.refuse()
    if any(begins_later):
        _refuse_part()
    labels.mask = mask if has_padding else None


def _refuse_part() -> NoReturn:
    raise ValueError(
        "position_ids begin after 0, and there is no cache with the tokens before them: a part of a "
        "sequence, as sequence and context parallelism make them, would attend to itself alone; pass whole "
        "sequences with positions from 0, or leave position_ids out"
    )


def _is_part(arguments: dict[str, Any]) -> Tensor | None:
    """(rows,): whether a row goes on from tokens that are not there. A first position above 0 from which
    the next one does not go up is left padding. Images have planes of coordinates: all must say so."""
    given = arguments.get("position_ids")
    positions = arguments.get("cache_position") if given is None else given
    if not isinstance(positions, Tensor) or isinstance(positions, FakeTensor) or not positions.numel():
        return None
    positions = torch.atleast_2d(positions)
    found = positions[..., 0] > 0
    if positions.shape[-1] > 1:
        found = found & (positions[..., 1] > positions[..., 0])
    every: Tensor = found.all(0) if positions.ndim == 3 else found
    return every


def _starts_from_lengths(
    cu_seq_lens: Tensor, is_part: Tensor | None, num_rows: int, num_tokens: int
) -> tuple[tuple[int, ...], ...]:
    if is_part is None:
        bounds = cu_seq_lens.tolist()
    else:  # in one go, so that a GPU is waited for once
        *bounds, begins_later = torch.cat([cu_seq_lens, is_part.any()[None].to(cu_seq_lens)]).tolist()
        if begins_later:
            _refuse_part()
    if num_rows != 1 or bounds[0] != 0 or bounds[-1] != num_tokens or bounds != sorted(bounds):
        raise ValueError(
            f"cu_seq_lens_q {bounds[:3]}...{bounds[-1:]} does not cut one row of {num_tokens} tokens, but "
            f"{num_rows} row(s) were passed: it must ascend from 0 to {num_tokens}"
        )
    return (tuple(sorted(set(bounds[:-1]) - {num_tokens})),)


def _starts_from_positions(
    position_ids: Tensor, is_part: Tensor, num_rows: int
) -> tuple[tuple[int, ...], ...]:
    if (
        position_ids.ndim == 3
    ):  # a plane for each rotary axis, after one of plain positions, if there are four
        if position_ids.shape[0] != 4:
            if bool(is_part.any()):
                _refuse_part()
            return ((0,),) * num_rows
        position_ids = position_ids[0]
    breaks = torch.diff(position_ids, dim=-1) != 1
    starts = _starts_from_breaks(torch.cat([is_part[:, None], breaks], dim=1))
    return starts * num_rows if len(starts) == 1 else starts


def _starts_from_breaks(breaks_BT: Tensor) -> tuple[tuple[int, ...], ...]:
    """(B, T): whether a token does not go on from the one before it; of the first one, whether it should."""
    rows: list[list[int]] = [[0] for _ in range(breaks_BT.shape[0])]
    for row, token in breaks_BT.nonzero().tolist():
        if token == 0:
            _refuse_part()
        rows[row].append(token)
    return tuple(tuple(row) for row in rows)


def _check_sequence_numbers(seq_idx: Tensor, starts: tuple[tuple[int, ...], ...]) -> None:
    """Kernels of some layers with state tell sequences apart by `seq_idx`, and attention does not."""
    found = _starts_from_breaks(torch.diff(seq_idx, dim=-1, prepend=seq_idx[..., :1]) != 0)
    if found != starts and found * len(starts) != starts:
        raise ValueError(
            f"seq_idx says that the first row's sequences begin at {found[0]}, position_ids or cu_seq_lens_q "
            f"say {starts[0]}: pass position_ids that start again with each sequence"
        )
