"""Short names of what a run begins with: two that are alike are, but for bad luck, the same samples or
weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

_COLUMNS = (
    *("input_ids", "labels", "completion_mask", "assistant_masks", "seq_lengths"),
    *("prompt_ids", "chosen_ids", "rejected_ids"),
)
_BATCH_ROWS = 1000
_MOST_BATCHES = 1000
"""Where there are more than a million rows, batches at even distances are looked at."""
_END_BYTES = 2**20
_WEIGHTS = ("*.safetensors", "*.bin", "config.json")


def samples_fingerprint(dataset: Any) -> str | None:
    """The token ids and labels of prepared samples, in their order; `None`: they come one after another,
    from a stream."""
    from datasets import Dataset

    if not isinstance(dataset, Dataset):
        return None
    columns = [name for name in _COLUMNS if name in dataset.column_names] or ["prompt"]
    digest = xxhash.xxh3_64(f"{len(dataset)} {columns}".encode())
    rows = dataset.select_columns(columns).with_format("arrow")
    starts = range(0, len(dataset), _BATCH_ROWS)
    for start in starts[:: -(-len(starts) // _MOST_BATCHES) or 1]:
        table = rows[start : start + _BATCH_ROWS]
        for name in columns:
            _update(digest, table.column(name).combine_chunks())
    return digest.hexdigest()


def folder_fingerprint(name: str, revision: str | None) -> str:
    """A model: its name on the Hub, or what the config and both ends of each file of weights hold, so that a
    folder may be moved."""
    folder = Path(name)
    if not folder.is_dir():
        return f"{name} {revision or ''}".strip()
    digest = xxhash.xxh3_64()
    for path in sorted({path for pattern in _WEIGHTS for path in folder.glob(pattern)}):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(_END_BYTES))
            file.seek(max(0, size - _END_BYTES))
            digest.update(file.read(_END_BYTES))
    return digest.hexdigest()


def _update(digest: Any, values: Any) -> None:
    """The lengths and values of a column of numbers or of lists of numbers."""
    array = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        lengths = array.value_lengths().fill_null(-1)
        digest.update(np.ascontiguousarray(lengths.to_numpy(zero_copy_only=False)).astype(np.int64))
        _update(digest, array.flatten())
        return
    if not (pa.types.is_primitive(array.type) or pa.types.is_null(array.type)):  # text, or messages
        digest.update(repr(array.to_pylist()).encode())
        return
    numbers = array.cast(pa.int64()) if pa.types.is_boolean(array.type) else array
    digest.update(np.ascontiguousarray(numbers.fill_null(-1).to_numpy(zero_copy_only=False)).astype(np.int64))
