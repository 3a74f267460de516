"""Columns of lists as Arrow stores them: flat values, and where each row begins; no Python object a token.

A dataset on disk is mapped into memory, so that a pass over it holds a few batches, however long it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

if TYPE_CHECKING:
    from datasets import Dataset

BATCH_SAMPLES = 256
Offsets = npt.NDArray[np.int64]


def is_ragged(kind: Any) -> bool:
    """Whether an Arrow type is a list of some kind."""
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def tables(dataset: Dataset, columns: Sequence[str]) -> Iterator[tuple[int, Any]]:
    """Arrow tables of some columns of a dataset, one after another, each with the number of its first row."""
    start = 0
    for table in dataset.select_columns(list(columns)).with_format("arrow").iter(BATCH_SAMPLES):
        yield start, table
        start += len(table)


def flat(column: Any) -> tuple[Offsets, Any]:
    """Offsets (N + 1) and flat values of the N lists of a column.

    Args:
        column: Arrow array or chunked array of lists.
    """
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    offsets: list[Offsets] = [np.zeros(1, dtype=np.int64)]
    values = []
    for chunk in chunks:
        if pa.types.is_fixed_size_list(chunk.type):
            ends = np.arange(1, len(chunk) + 1, dtype=np.int64) * chunk.type.list_size
            values.append(
                chunk.values.slice(chunk.offset * chunk.type.list_size, int(ends[-1]) if len(ends) else 0)
            )
        else:
            own = chunk.offsets.to_numpy().astype(np.int64)
            ends = own[1:] - own[0]
            values.append(chunk.values.slice(int(own[0]), int(own[-1] - own[0])))
        offsets.append(ends + offsets[-1][-1])
    joined = (
        values[0] if len(values) == 1 else pa.concat_arrays(values) if values else pa.array([], pa.int64())
    )
    return np.concatenate(offsets), joined


def row_of(offsets: Offsets, position: int) -> int:
    """The row that holds the flat value at `position`."""
    return int(np.searchsorted(offsets, position, side="right")) - 1
