"""Datasets by name: a local file or folder, a name on the Hub, or the default corpus; each fault is one line.

The kinds of samples are TRL's: `messages` (or `conversations`), `prompt` and `completion`, plain text, or
`input_ids` that somebody else has made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import pyarrow as pa

from chunkdist.data.columns import TOKEN_COLUMNS, text_fault, token_fault
from chunkdist.data.corpus import read_standard_library, split_documents
from chunkdist.data.files import (
    files_of,
    load_file,
    load_folder,
    readable_endings,
    reader_of,
    refuse_broken,
    refuse_unreadable,
    root_message,
)
from chunkdist.data.ragged import tables

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    AnyDataset: TypeAlias = Dataset | IterableDataset

STDLIB_NAME = "python-stdlib"

SampleKind = Literal["messages", "prompt_completion", "text", "tokens"]


def load_splits(
    name: str, config: str | None = None, *, corpus_max_bytes: int = 4_000_000, streaming: bool = False
) -> dict[str, AnyDataset]:
    """The splits of a dataset.

    Args:
        name: A file of `chunkdist.data.files.READERS`, compressed or not, a folder of these or of
            `save_to_disk`, a name on the Hub, or `python-stdlib`.
        config: The configuration of a dataset on the Hub.
        corpus_max_bytes: How much of the standard library `python-stdlib` reads.
        streaming: The splits are read while they are iterated, not before.

    Raises:
        ValueError: there is no such dataset, or it cannot be read; names the file, and the line where there
            is one.
    """
    path = Path(name).expanduser()
    if config is not None and (name == STDLIB_NAME or path.exists()):
        raise ValueError(
            f"dataset_config={config!r} with dataset_name={name!r}, which is not on the Hub and has no "
            "configurations: leave dataset_config out"
        )
    if name == STDLIB_NAME:
        splits = _standard_library(corpus_max_bytes)
        return (
            {split: rows.to_iterable_dataset() for split, rows in splits.items()}
            if streaming
            else dict(splits)
        )
    if path.is_dir():
        return load_folder(path, streaming=streaming)
    if reader_of(path) is not None:
        return load_file(path, streaming=streaming)
    if path.exists():
        raise ValueError(
            f"dataset_name={name!r} is a {path.suffix or 'nameless'} file: write {readable_endings()}"
        )
    if name.startswith((".", "/", "~")):
        raise ValueError(f"dataset_name={name!r} does not exist")
    return _load_from_hub(name, config, streaming)


def load_mixture(load: Callable[[], Mapping[str, AnyDataset]], parts: Sequence[Any]) -> dict[str, AnyDataset]:
    """What `load` gives of several datasets, whose files have been looked at.

    Args:
        parts: TRL's `DatasetConfig`.

    Raises:
        ValueError: one of them cannot be read.
    """
    given = [getattr(part, "data_files", None) or () for part in parts]
    names = [name for files in given for name in _names(files)]
    for path in filter(Path.exists, map(Path, names)):
        refuse_unreadable(path)
    try:
        return dict(load())
    except Exception as error:
        for path in filter(Path.is_file, map(Path, names)):
            refuse_broken(path)
        raise ValueError(f"datasets cannot be read: {root_message(error)}") from error


def _names(files: Any) -> list[str]:
    """The names in `data_files`: one, a list, or a mapping of these."""
    if isinstance(files, Mapping):
        return [name for value in files.values() for name in _names(value)]
    return [files] if isinstance(files, str) else [str(name) for name in files]


def pick_split(splits: Mapping[str, AnyDataset], split: str, *, option: str, name: str) -> AnyDataset:
    """One split; a ValueError names those that there are."""
    if split not in splits:
        raise ValueError(
            f"{option}={split!r} is not a split of {name!r}: write one of {', '.join(sorted(splits))}"
            + ("; or eval_strategy: 'no'" if option == "dataset_test_split" else "")
        )
    return splits[split]


def sample_kind(dataset: Dataset, *, text_field: str, name: str) -> SampleKind:
    """Which of TRL's kinds the samples are, from the columns; the values of all samples are looked at.

    Raises:
        ValueError: no usable column, no samples, or a sample whose value is missing, of another type, padded,
            or of another length than its `input_ids`; names the first one.
    """
    if len(dataset) == 0:
        raise ValueError(f"{name!r} has no samples")
    kind, used = kind_of_columns(dataset.column_names, text_field=text_field, name=name)
    fault = _first_token_fault(dataset) if kind == "tokens" else _first_text_fault(dataset, kind, used)
    if fault is not None:
        for file in files_of(Path(name)) if "UTF-8" in fault[1] else ():
            refuse_broken(file)
        raise ValueError(f"{name!r}, sample {fault[0]}: {fault[1]}")
    return kind


def kind_of_columns(columns: Iterable[str], *, text_field: str, name: str) -> tuple[SampleKind, list[str]]:
    """The kind of samples with these columns, and the columns that hold what is trained on.

    Raises:
        ValueError: there are none.
    """
    columns = list(columns)
    if "input_ids" in columns:
        return "tokens", ["input_ids"]
    for column in ("messages", "conversations"):
        if column in columns:
            return "messages", [column]
    if "prompt" in columns and "completion" in columns:
        return "prompt_completion", ["prompt", "completion"]
    if text_field in columns:
        return "text", [text_field]
    raise ValueError(
        f"{name!r} has no usable column, only {', '.join(columns)}: write samples with 'messages', with "
        f"'prompt' and 'completion', or with {text_field!r} (dataset_text_field names another column)"
    )


def sample_fault(sample: Mapping[str, Any], kind: SampleKind, used: list[str]) -> str | None:
    """What is wrong with one sample of a stream, as `sample_kind` would say it of a whole dataset's."""
    if kind != "tokens":
        return text_fault(sample, used)
    try:
        table = pa.table({column: [sample[column]] for column in TOKEN_COLUMNS if column in sample})
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
        return f"no lists of token ids ({root_message(error)})"
    fault = token_fault(table)
    return None if fault is None else fault[1]


def is_conversational(sample: Mapping[str, Any], kind: SampleKind) -> bool:
    """Whether samples like this one are lists of messages, which need a chat template."""
    return kind == "messages" or (kind == "prompt_completion" and isinstance(sample["prompt"], list))


def _first_token_fault(dataset: Dataset) -> tuple[int, str] | None:
    for start, table in tables(dataset, [name for name in TOKEN_COLUMNS if name in dataset.column_names]):
        fault = token_fault(table)
        if fault is not None:
            return start + fault[0], fault[1]
    return None


def _first_text_fault(dataset: Dataset, kind: SampleKind, used: list[str]) -> tuple[int, str] | None:
    """Columns of text are looked at without a Python object a sample."""
    for start, table in tables(dataset, used):
        if kind != "messages" and all(_is_whole_text(column) for column in table.columns):
            continue
        rows = dataset.select_columns(used).select(range(start, start + len(table)))
        for row in range(len(table)):
            try:
                fault = text_fault(rows[row], used)
            except UnicodeDecodeError as error:  # the reader of JSON does not look
                fault = f"not UTF-8 (byte {error.object[error.start]:#04x})"
            if fault is not None:
                return start + row, fault
    return None


def _is_whole_text(column: Any) -> bool:
    """Whether an Arrow column is text without a null, all of it UTF-8."""
    if column.null_count or not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        return False
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def _standard_library(max_bytes: int) -> dict[str, Dataset]:
    from datasets import Dataset

    train, test = split_documents(read_standard_library(max_bytes=max_bytes))
    splits = {"train": train, "test": test}
    return {
        split: Dataset.from_dict({"text": [document.text for document in documents]})
        for split, documents in splits.items()
        if documents
    }


def _load_from_hub(name: str, config: str | None, streaming: bool) -> dict[str, AnyDataset]:
    import datasets

    try:
        return dict(datasets.load_dataset(name, config, streaming=streaming))
    except Exception as error:  # the Hub's client raises many kinds
        raise ValueError(
            f"dataset_name={name!r} is neither a file or folder here nor a dataset that the Hub gives: "
            f"{root_message(error)}"
        ) from error
