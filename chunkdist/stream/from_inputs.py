"""Reads the stream of a forward from what the caller passed: rows, tokens, padding, segments, equal
beginnings.

Read once a step, so a GPU waits at most once, and not at all without attention_mask, position_ids,
cu_seq_lens_q and rows to compare.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from chunkdist.stream.layout import Layout, PrefixRule, SequencePlace, lay_out
from chunkdist.stream.padding import ForwardLabels
from chunkdist.stream.stream import Stream, cut, cut_segments

Starts = tuple[tuple[int, ...], ...]
"""For each row, the first token of each of its segments."""

_TOLD_OTHERWISE = frozenset(
    ("input_ids", "attention_mask", "position_ids", "cache_position", "labels", "shift_labels", "seq_idx")
)
"""Arguments that may have a number for each token. They are compared anyway, or make no token another one."""

WhyNot = Callable[[int], str | None]
"""Why something cannot be done with rows of so many tokens, padding included; `None`: it can."""


def _possible(num_tokens: int) -> None:
    """Nothing is in the way."""


def read_stream(
    arguments: dict[str, Any],
    chunk_size: int,
    *,
    cut_at_segments: bool = False,
    why_rows: WhyNot = _possible,
    why_right_padding: WhyNot = _possible,
    sharing: Callable[[], PrefixRule | None] = lambda: None,
    labels: ForwardLabels | None = None,
) -> tuple[Stream, Layout | None]:
    """The stream of a decoder's arguments, and how their rows become that stream; `None`: they are it.

    Segments come from `cu_seq_lens_q` (N + 1,), or from `position_ids` (B, T) that do not go on by one, as in
    transformers' packing; with an `attention_mask` (B, T) rows are padded, not packed.

    Args:
        cut_at_segments: Chunks end where segments do, too.
        why_rows: Why rows cannot become one stream, which with padding they do if they can.
        why_right_padding: Why padding must be on the right.
        sharing: Which beginnings that sequences have in common are computed once; `None`: they are not looked
            for. Called where there may be several sequences; `None` where there are no ids.
        labels: The forward's labels; `None`: not known.

    Raises:
        ValueError: left padding where there must be rows; a gap, or a mask of another shape; labels of
            padding; positions that do not begin at 0; `seq_idx` with other segments; several rows with
            different segments, where chunks end where segments do.
    """
    ids, embeddings = arguments.get("input_ids"), arguments.get("inputs_embeds")
    tokens = embeddings if ids is None else ids
    if tokens is None:
        raise ValueError("neither input_ids nor inputs_embeds were passed")
    num_rows, num_tokens = shape = (tokens.shape[0], tokens.shape[1])
    if num_tokens == 0:
        raise ValueError("input_ids have no tokens: pass at least one")
    told_apart = arguments.get("position_ids"), arguments.get("cu_seq_lens_q")
    may_share = num_rows > 1 or any(x is not None for x in told_apart)
    may_share = may_share and not isinstance(tokens, FakeTensor)
    rule = sharing() if may_share else None
    labels = labels or ForwardLabels()
    mask = _checked_mask(arguments.get("attention_mask"), num_tokens)
    arguments = {**arguments, "attention_mask": mask}
    compared = () if rule is None else _compared(arguments, shape)
    arguments, has_labels = _on_host(arguments, labels, compared=compared)
    labels.mask = None
    is_part = _is_part(arguments)
    cu_seq_lens, position_ids = arguments.get("cu_seq_lens_q"), arguments.get("position_ids")
    starts: Starts = ((0,),) * num_rows
    padded = None
    if mask is not None:
        if is_part is not None and bool(is_part.any()):
            _refuse_part()
        if not isinstance(mask, FakeTensor):
            padded = _sequences_between_padding(arguments["attention_mask"], why_right_padding)
            if has_labels:
                labels.refuse()
            labels.mask = None if padded is None else mask
    elif cu_seq_lens is not None and not isinstance(cu_seq_lens, FakeTensor):
        starts = _starts_from_lengths(cu_seq_lens, is_part, num_rows, num_tokens)
    elif position_ids is not None and not isinstance(position_ids, FakeTensor):
        assert is_part is not None
        starts = _starts_from_positions(position_ids, is_part, num_rows)
    elif is_part is not None and bool(is_part.any()):
        _refuse_part()
    if padded:
        starts = _starts_behind_padding(padded, num_rows)
    seq_idx = arguments.get("seq_idx")
    if isinstance(seq_idx, Tensor) and not isinstance(seq_idx, FakeTensor):
        _check_sequence_numbers(seq_idx, starts)
    sequences = padded or _sequences_of(starts, num_tokens)
    if (padded or (rule is not None and len(sequences) > 1)) and why_rows(num_tokens) is None:
        keys = [] if rule is None else _keys(arguments, compared, shape, sequences)
        layout = lay_out(shape, sequences, tokens.device, keys=keys, rule=rule)
        if padded or layout.num_tokens < layout.num_passed:
            return _stream_of(layout, chunk_size, cut_at_segments=cut_at_segments), layout
    if not cut_at_segments:
        return Stream(num_tokens=num_tokens, chunks=cut(num_tokens, chunk_size), segment_starts=starts), None
    if len(set(starts)) > 1:
        raise ValueError(
            f"{num_rows} rows were passed whose packed sequences begin at different tokens: a model with "
            "state between tokens needs one row, with all sequences one after another in it"
        )
    chunks = cut_segments(starts[0], num_tokens, chunk_size)
    return Stream(num_tokens=num_tokens, chunks=chunks, segment_starts=starts), None


def _stream_of(layout: Layout, chunk_size: int, *, cut_at_segments: bool) -> Stream:
    starts, num_tokens = layout.segment_starts, layout.num_tokens
    return Stream(
        num_tokens=num_tokens,
        chunks=cut_segments(starts, num_tokens, chunk_size)
        if cut_at_segments
        else cut(num_tokens, chunk_size),
        segment_starts=(starts,),
        branches=layout.branches,
    )


def _on_host(
    arguments: dict[str, Any], labels: ForwardLabels, *, compared: Sequence[str]
) -> tuple[dict[str, Any], bool]:
    """The arguments with what is read of them in host memory, and whether padding has labels: one wait.

    Args:
        compared: What is read of all tokens, positions too; empty: nothing is compared.
    """
    read = {
        key: arguments[key]
        for key in ("attention_mask", "position_ids", "cache_position", "cu_seq_lens_q", "seq_idx")
        if isinstance(arguments.get(key), Tensor) and not isinstance(arguments[key], FakeTensor)
    }
    read |= {key: arguments[key] for key in compared}
    if "attention_mask" in read:
        read["attention_mask"] = read["attention_mask"] != 0
        read["labels"] = labels.on_padding(read["attention_mask"])
        if not compared and "position_ids" in read:
            read["position_ids"] = read["position_ids"][..., :2]
    if any(x.device.type != "cpu" for x in read.values()):
        device = next(x.device for x in read.values() if x.device.type != "cpu")
        flat = torch.cat([x.to(device, torch.int64).flatten() for x in read.values()]).cpu()
        parts = flat.split([x.numel() for x in read.values()])
        read = {key: part.view(x.shape) for (key, x), part in zip(read.items(), parts, strict=True)}
    has_labels = bool(read.pop("labels", False))
    return {**arguments, **read}, has_labels


def _checked_mask(mask: object, num_tokens: int) -> Tensor | None:
    """Raises on masks that say more than which tokens are padding."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[1] != num_tokens:
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"attention_mask {shape} is not (rows, {num_tokens} tokens): chunked models take padding, "
            "and packed segments by position_ids; leave custom masks out"
        )
    return mask


def _sequences_between_padding(mask_BT: Tensor, why_right_padding: WhyNot) -> list[SequencePlace] | None:
    """The rows' sequences; `None`: there is no padding, or nothing else."""
    is_real = mask_BT != 0
    if bool(is_real.all()) or not bool(is_real.any()):
        return None
    rises = is_real[:, 1:] & ~is_real[:, :-1]
    if bool((rises.sum(1) + is_real[:, 0] > 1).any()):
        raise ValueError(
            "attention_mask has a gap between a row's tokens: write padding before or behind them "
            "(padding_side='left' or 'right')"
        )
    if bool(rises.any()) and (reason := why_right_padding(mask_BT.shape[1])) is not None:
        raise ValueError(f"attention_mask has left padding, and {reason}: set padding_side='right'")
    first_B, length_B = is_real.to(torch.uint8).argmax(1).tolist(), is_real.sum(1).tolist()
    return [
        SequencePlace(row, first, first + length)
        for row, (first, length) in enumerate(zip(first_B, length_B, strict=True))
        if length
    ]


def _starts_behind_padding(sequences: Sequence[SequencePlace], num_rows: int) -> Starts:
    """What is before a row's sequence is a segment of its own."""
    first = {place.row: place.start for place in sequences}
    return tuple((0, first[row]) if first.get(row) else (0,) for row in range(num_rows))


def _sequences_of(starts: Starts, num_tokens: int) -> list[SequencePlace]:
    return [
        SequencePlace(row, start, end)
        for row, own in enumerate(starts)
        for start, end in pairwise((*own, num_tokens))
    ]


def _compared(arguments: dict[str, Any], shape: tuple[int, int]) -> list[str]:
    """What tells tokens apart beside their positions: ids, and what else has a number for each token, such as
    their types."""
    others = (
        key
        for key, x in arguments.items()
        if key not in _TOLD_OTHERWISE and isinstance(x, Tensor) and x.shape[:2] == shape
    )
    return ["input_ids", *others]


def _keys(
    arguments: dict[str, Any],
    compared: Sequence[str],
    shape: tuple[int, int],
    sequences: Sequence[SequencePlace],
) -> list[Tensor]:
    """By sequence, what its tokens are compared by, and positions where they were passed (tokens, any)."""
    columns = [arguments[key].to(torch.int64)[..., None].flatten(2) for key in compared]
    positions = arguments.get("position_ids")
    if isinstance(positions, Tensor):
        planes = positions if positions.ndim == 3 else torch.atleast_2d(positions)[None]
        columns.append(planes.to(torch.int64).expand(planes.shape[0], *shape).movedim(0, -1))
    keys = torch.cat(columns, dim=-1)
    return [keys[place.row, place.start : place.end].contiguous() for place in sequences]


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
