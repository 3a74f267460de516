"""Tokenised samples before they are packed: none is truncated or dropped unasked, none has nothing to learn.

A sample is a row with `input_ids` and `labels` of the same length; a label of -100 is not supervised, and the
first label never is, since no token comes before it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from chunkdist.data.ragged import flat, tables

if TYPE_CHECKING:
    from datasets import Dataset

LongSamples = Literal["error", "truncate", "split", "drop"]
_BATCH_SAMPLES = 1_000


def fit_samples(
    dataset: Dataset,
    *,
    max_length: int | None,
    long_samples: LongSamples,
    is_text: bool,
    name: str,
    keep_end: bool = False,
    say: Callable[[str], None] = print,
) -> Dataset:
    """The samples, none longer than `max_length` tokens, each with a supervised token.

    Args:
        dataset: Rows with `input_ids` and `labels`.
        max_length: Tokens; `None` is no limit.
        long_samples: What becomes of a longer sample: an error, its first tokens, all its tokens in several
            pieces (plain text only), or nothing.
        is_text: Whether the samples are plain text, which may be cut anywhere.
        name: What messages call the dataset.
        keep_end: Truncation keeps the last tokens instead of the first.
        say: Takes a line about what was done to how many samples.

    Raises:
        ValueError: a sample is too long or has no supervised token; names the first one.
    """
    lengths, supervised = _measure(dataset)
    _refuse_too_short(lengths, name)
    _refuse_unsupervised(supervised, name, "every label is -100: nothing in it is to be learned")
    if max_length is None:
        return dataset
    is_long = lengths > max_length
    num_long = int(is_long.sum())
    if num_long == 0:
        return dataset
    first = int(np.argmax(is_long))
    report = f"{name}: {num_long} of {len(lengths)} samples are longer than max_length={max_length} tokens"
    if long_samples == "error":
        raise ValueError(
            f"{report}, sample {first} is the first with {lengths[first]}: raise max_length, or write "
            "long_samples: truncate, drop" + (" or split" if is_text else "")
        )
    if long_samples == "drop":
        if num_long == len(lengths):
            raise ValueError(f"{report}, long_samples=drop leaves none: raise max_length")
        say(f"{report} and were dropped (long_samples=drop)")
        return dataset.select(np.flatnonzero(~is_long))
    if long_samples == "truncate":
        part = slice(-max_length, None) if keep_end else slice(None, max_length)
        dataset = dataset.map(_cut, fn_kwargs={"part": part}, desc=f"Truncating {name}")
        kept = "last" if keep_end else "first"
        _refuse_unsupervised(_measure(dataset)[1], name, f"none is among its {kept} {max_length} tokens")
        say(f"{report}; only their {kept} {max_length} tokens are used (long_samples=truncate)")
        return dataset
    if not is_text:
        raise ValueError(
            f"long_samples=split cuts plain text only, and {report}: write long_samples: truncate or drop"
        )
    pieces = dataset.map(
        _split,
        fn_kwargs={"max_length": max_length},
        batched=True,
        batch_size=_BATCH_SAMPLES,
        desc=f"Splitting {name}",
    )
    say(f"{report} and were split: {len(lengths)} samples became {len(pieces)} (long_samples=split)")
    return pieces


def sample_lengths(dataset: Dataset) -> list[int]:
    """Tokens of each sample."""
    return [int(length) for length in _measure(dataset)[0]]


def _measure(dataset: Dataset) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Tokens, and supervised tokens, of each sample."""
    lengths: list[npt.NDArray[np.int64]] = []
    supervised: list[npt.NDArray[np.int64]] = []
    for _, table in tables(dataset, ["labels"]):
        offsets, labels = flat(table["labels"])
        counts = np.concatenate([[0], np.cumsum(labels.to_numpy(zero_copy_only=False) != -100)])
        starts, ends = offsets[:-1], offsets[1:]
        lengths.append(ends - starts)
        supervised.append(counts[ends] - counts[np.minimum(starts + 1, ends)])
    return np.concatenate(lengths), np.concatenate(supervised)


def _refuse_too_short(lengths: npt.NDArray[np.int64], name: str) -> None:
    short = np.flatnonzero(lengths < 2)
    if len(short):
        tokens = "one token" if lengths[short[0]] else "no token"
        raise ValueError(
            f"{name}, sample {short[0]} has {tokens}: there is no next token to predict; {len(short)} of "
            f"{len(lengths)} samples are so: take them out"
        )


def _refuse_unsupervised(supervised: npt.NDArray[np.int64], name: str, why: str) -> None:
    empty = np.flatnonzero(supervised == 0)
    if len(empty):
        raise ValueError(
            f"{name}, sample {empty[0]}: no supervised token ({why}); {len(empty)} of {len(supervised)} "
            "samples are "
            "so: take them out, or look at the chat template's {% generation %} part, assistant_only_loss "
            "and "
            "completion_only_loss"
        )


def _cut(sample: dict[str, Any], part: slice) -> dict[str, Any]:
    return {column: sample[column][part] for column in ("input_ids", "labels")}


def _split(batch: dict[str, list[list[int]]], max_length: int) -> dict[str, list[list[int]]]:
    return {
        column: [
            values[start : start + max_length]
            for values in batch[column]
            for start in range(0, len(values), max_length)
        ]
        for column in ("input_ids", "labels")
    }
