"""Samples of TRL's other trainers: a prompt, and pairs of a chosen and a rejected answer. None is cut or
dropped unasked, and each fault is a line."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from chunkdist.data.columns import text_fault
from chunkdist.data.ragged import flat, row_of, tables
from chunkdist.data.token_ids import first_outside, outside

if TYPE_CHECKING:
    from datasets import Dataset

LongPairs = Literal["error", "truncate", "drop"]
_IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
"""Columns that TRL (1.16) makes; a reward model's samples have no prompt."""


def pairs_of_texts(dataset: Dataset, *, prompt_chars: int = 1024, answer_chars: int = 512) -> Dataset:
    """Plain text as preferences: how a document goes on, before how another one does there."""
    from datasets import Dataset

    size = prompt_chars + answer_chars
    texts = [text[:size] for text in dataset["text"] if len(text) >= size and text[:size].isascii()]
    answers = [text[prompt_chars:] for text in texts]
    return Dataset.from_dict(
        {
            "prompt": [text[:prompt_chars] for text in texts],
            "chosen": answers,
            "rejected": answers[1:] + answers[:1],
        }
    )


def check_columns(dataset: Dataset, needed: tuple[str, ...], *, name: str) -> dict[str, Any]:
    """Looks at the values of all samples; returns the first one.

    Args:
        needed: `prompt`, or `chosen` and `rejected`, which may have a `prompt` beside them.

    Raises:
        ValueError: no samples, a column is missing, or a sample's value is; names the first one.
    """
    if len(dataset) == 0:
        raise ValueError(f"{name!r} has no samples")
    if missing := [column for column in needed if column not in dataset.column_names]:
        raise ValueError(
            f"{name!r} has no column {' and no column '.join(map(repr, missing))}, only "
            f"{', '.join(dataset.column_names)}: write samples with {' and '.join(map(repr, needed))}"
        )
    used = [column for column in ("prompt", "chosen", "rejected") if column in dataset.column_names]
    for number, sample in enumerate(dataset.select_columns(used)):
        fault = _fault(sample, used)
        if fault is not None:
            raise ValueError(f"{name!r}, sample {number}: {fault}")
    if "margin" in dataset.column_names and "prompt" not in needed:
        for number, margin in enumerate(dataset["margin"]):
            if not isinstance(margin, int | float) or not math.isfinite(margin):
                raise ValueError(
                    f"{name!r}, sample {number}: 'margin' is {margin!r:.40}: write a number in each one, or "
                    "leave the column out"
                )
    first: dict[str, Any] = dataset[0]
    return first


def _fault(sample: Mapping[str, Any], used: list[str]) -> str | None:
    for column in used:
        value = sample[column]
        is_chat = isinstance(value, list)
        if is_chat != isinstance(sample[used[0]], list):
            return f"{column!r} and {used[0]!r} differ in kind: write all as text or all as messages"
        key = "messages" if is_chat else column
        fault = text_fault({key: value}, [key])
        if fault is not None:
            return fault.replace("'messages'", repr(column))
    return None


def fit_pairs(
    dataset: Dataset,
    *,
    max_length: int | None,
    long_samples: LongPairs,
    name: str,
    say: Callable[[str], None] = print,
) -> Dataset:
    """The tokenised pairs, none longer than `max_length` tokens unless they are to be truncated.

    Args:
        dataset: Rows with `chosen_ids` and `rejected_ids`, and perhaps `prompt_ids` before both.
        say: Takes a line about what was done to how many samples.

    Raises:
        ValueError: an answer has no token, or a sample is too long; names the first one.
    """
    lengths = {column: _lengths(dataset, column) for column in _IDS if column in dataset.column_names}
    for column in ("chosen_ids", "rejected_ids"):
        if len(empty := np.flatnonzero(lengths[column] == 0)):
            raise ValueError(
                f"{name}, sample {empty[0]}: {column.removesuffix('_ids')!r} has no token of its own: take "
                "it out"
            )
    prompts = lengths.get("prompt_ids", np.zeros(1, dtype=np.int64))
    longest = prompts + np.maximum(lengths["chosen_ids"], lengths["rejected_ids"])
    if max_length is None or not (is_long := longest > max_length).any():
        return dataset
    first, num_long = int(np.argmax(is_long)), int(is_long.sum())
    report = f"{name}: {num_long} of {len(dataset)} samples are longer than max_length={max_length} tokens"
    if long_samples == "error":
        raise ValueError(
            f"{report}; sample {first} is the first with {longest[first]}: raise max_length, or write "
            "long_samples: truncate or drop"
        )
    if long_samples == "drop":
        if num_long == len(dataset):
            raise ValueError(f"{report}, so that none is left: raise max_length")
        say(f"{report} and were dropped (long_samples=drop)")
        return dataset.select(np.flatnonzero(~is_long))
    if len(full := np.flatnonzero(prompts >= max_length)):
        raise ValueError(
            f"{name}, sample {full[0]}: the prompt alone has {prompts[full[0]]} tokens and max_length is "
            f"{max_length}, so that no answer is left: raise max_length, or write long_samples: drop"
        )
    say(f"{report} and keep their first tokens (long_samples=truncate)")
    return dataset


def refuse_pair_ids_outside(dataset: Dataset, *, name: str, num_embeddings: int) -> None:
    """Raises on token ids that the model has no row for; names the first sample."""
    columns = [column for column in _IDS if column in dataset.column_names]
    for start, table in tables(dataset, columns):
        for column in columns:
            offsets, values = flat(table[column])
            tokens = values.to_numpy(zero_copy_only=False)
            position = first_outside(tokens, num_embeddings, allowed=None) if len(tokens) else None
            if position is not None:
                row = start + row_of(offsets, position)
                what = outside("input_ids", int(tokens[position]), num_embeddings)
                raise ValueError(f"{name}, sample {row}: {what}")


def _lengths(dataset: Dataset, column: str) -> npt.NDArray[np.int64]:
    return np.concatenate([np.diff(flat(table[column])[0]) for _, table in tables(dataset, [column])])
