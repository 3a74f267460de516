"""Token ids that a model has no row for: found in one pass over the data, before anything is trained.

On a GPU such an id is an assertion in a kernel, somewhere in the first step that meets it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from chunkdist.data.ragged import flat, row_of, tables
from chunkdist.data.streams import NO_LABEL

if TYPE_CHECKING:
    from datasets import Dataset

_SLICE_TOKENS = 2**22
"""Tokens compared at a time, which bounds the memory that a pass takes."""


def refuse_ids_outside(dataset: Dataset, *, name: str, num_embeddings: int, num_outputs: int) -> bool:
    """Goes over `input_ids` and `labels` of all samples.

    Args:
        dataset: Rows with lists of integers.
        name: What the message calls the dataset.
        num_embeddings: Rows of the embedding; ids are below.
        num_outputs: Rows of the output layer; labels are below, or -100.

    Returns:
        Whether the samples' lengths differ.

    Raises:
        ValueError: names the first sample that holds another id, and the id.
    """
    shortest, longest = int(np.iinfo(np.int64).max), 0
    for start, table in tables(dataset, ("input_ids", "labels")):
        for column in ("input_ids", "labels"):
            offsets, values = flat(table[column])
            tokens = values.to_numpy(zero_copy_only=False)
            limit = num_embeddings if column == "input_ids" else num_outputs
            position = first_outside(tokens, limit, allowed=NO_LABEL if column == "labels" else None)
            if position is not None:
                row = row_of(offsets, position)
                raise ValueError(
                    f"{name}, sample {start + row}: {outside(column, int(tokens[position]), limit)}"
                )
            if column == "input_ids":
                lengths = np.diff(offsets)
                shortest = min(shortest, int(lengths.min(initial=shortest)))
                longest = max(longest, int(lengths.max(initial=0)))
    return shortest < longest


def first_outside(tokens: npt.NDArray[Any], limit: int, *, allowed: int | None) -> int | None:
    """Where the first value is that is neither `allowed` nor in 0 .. limit - 1; `None`: nowhere."""
    for start in range(0, len(tokens), _SLICE_TOKENS):
        part = tokens[start : start + _SLICE_TOKENS]
        if int(part.min()) >= 0 and int(part.max()) < limit:
            continue
        is_outside = (part < 0) | (part >= limit)
        if allowed is not None:
            is_outside &= part != allowed
        if is_outside.any():
            return start + int(np.argmax(is_outside))
    return None


def outside(column: str, value: int, limit: int) -> str:
    """What is wrong with an id that a model of `limit` rows does not have."""
    if column == "labels":
        return (
            f"the label {value} is not among the {limit:,} tokens of the output layer: write 0 to "
            f"{limit - 1:,}, or -100 where nothing is to be learned"
        )
    return (
        f"the token id {value} is not among the {limit:,} of the model's embedding: write 0 to "
        f"{limit - 1:,}, tokenise with the model's own tokenizer, or resize the embedding of the saved model"
    )
