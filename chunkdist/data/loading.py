"""Datasets by name: a local file or folder, a name on the Hub, or the default corpus; each fault is one line.

The kinds of samples are TRL's: `messages` (or `conversations`), `prompt` and `completion`, plain text, or
`input_ids` that somebody else has made.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from chunkdist.data.corpus import read_standard_library, split_documents

if TYPE_CHECKING:
    from datasets import Dataset

STDLIB_NAME = "python-stdlib"
_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}

SampleKind = Literal["messages", "prompt_completion", "text", "tokens"]


def load_splits(
    name: str, config: str | None = None, *, corpus_max_bytes: int = 4_000_000
) -> dict[str, Dataset]:
    """The splits of a dataset.

    Args:
        name: A `.jsonl`, `.json` or `.parquet` file, a folder of these or of `save_to_disk`, a name on the
            Hub, or `python-stdlib`.
        config: The configuration of a dataset on the Hub.
        corpus_max_bytes: How much of the standard library `python-stdlib` reads.

    Raises:
        ValueError: there is no such dataset, or it cannot be read; names the file, and the line where there
            is one.
    """
    if name == STDLIB_NAME:
        return _standard_library(corpus_max_bytes)
    path = Path(name).expanduser()
    if path.is_dir():
        return _load_folder(path)
    if path.suffix in _READERS:
        return _load_file(path)
    if path.exists():
        raise ValueError(
            f"dataset_name={name!r} is a {path.suffix or 'nameless'} file: write {_readable_endings()}"
        )
    if name.startswith((".", "/", "~")):
        raise ValueError(f"dataset_name={name!r} does not exist")
    return _load_from_hub(name, config)


def pick_split(splits: Mapping[str, Dataset], split: str, *, option: str, name: str) -> Dataset:
    """One split; a ValueError names those that there are."""
    if split not in splits:
        raise ValueError(
            f"{option}={split!r} is not a split of {name!r}: write one of {', '.join(sorted(splits))}"
            + ("; or eval_strategy: 'no'" if option == "dataset_test_split" else "")
        )
    return splits[split]


def sample_kind(dataset: Dataset, *, text_field: str, name: str) -> SampleKind:
    """Which of TRL's kinds the samples are, from the columns; their first sample decides nothing.

    Raises:
        ValueError: no usable column, no samples, a sample whose value is missing, or padded `input_ids`.
    """
    columns = dataset.column_names
    if len(dataset) == 0:
        raise ValueError(f"{name!r} has no samples")
    if "input_ids" in columns:
        kind: SampleKind = "tokens"
        used = ["input_ids"]
        _refuse_padding(dataset, name)
    elif "messages" in columns or "conversations" in columns:
        kind = "messages"
        used = ["messages" if "messages" in columns else "conversations"]
    elif "prompt" in columns and "completion" in columns:
        kind = "prompt_completion"
        used = ["prompt", "completion"]
    elif text_field in columns:
        kind = "text"
        used = [text_field]
    else:
        raise ValueError(
            f"{name!r} has no usable column, only {', '.join(columns)}: write samples with 'messages', with "
            "'prompt' "
            f"and 'completion', or with {text_field!r} (dataset_text_field names another column)"
        )
    for column in used:
        _refuse_missing(dataset, column, name)
    return kind


def is_conversational(dataset: Dataset, kind: SampleKind) -> bool:
    """Whether the samples are lists of messages, which need a chat template."""
    return kind == "messages" or (kind == "prompt_completion" and isinstance(dataset[0]["prompt"], list))


def _standard_library(max_bytes: int) -> dict[str, Dataset]:
    from datasets import Dataset

    train, test = split_documents(read_standard_library(max_bytes=max_bytes))
    splits = {"train": train, "test": test}
    return {
        split: Dataset.from_dict({"text": [document.text for document in documents]})
        for split, documents in splits.items()
        if documents
    }


def _load_file(path: Path) -> dict[str, Dataset]:
    import datasets

    if not path.exists():
        raise ValueError(f"dataset_name='{path}' does not exist")
    reader = _READERS[path.suffix]
    _refuse_unreadable(path)
    try:
        loaded = datasets.load_dataset(reader, data_files=str(path))
    except Exception as error:
        if reader == "json":
            _refuse_broken_json(path)
        raise ValueError(f"{path} cannot be read as {path.suffix[1:]}: {_root_message(error)}") from error
    return dict(loaded)


def _load_folder(path: Path) -> dict[str, Dataset]:
    import datasets

    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        loaded = datasets.load_from_disk(str(path))
        return dict(loaded) if isinstance(loaded, datasets.DatasetDict) else {"train": loaded}
    if not any(file.suffix in _READERS for file in path.rglob("*")):
        raise ValueError(f"dataset_name='{path}' is a folder without {_readable_endings()}")
    try:
        return dict(datasets.load_dataset(str(path)))
    except Exception as error:
        for file in sorted(path.rglob("*.json*")):
            _refuse_broken_json(file)
        raise ValueError(f"the files in {path} cannot be read: {_root_message(error)}") from error


def _load_from_hub(name: str, config: str | None) -> dict[str, Dataset]:
    import datasets

    try:
        return dict(datasets.load_dataset(name, config))
    except Exception as error:  # the Hub's client raises many kinds
        raise ValueError(
            f"dataset_name={name!r} is neither a file or folder here nor a dataset that the Hub gives: "
            f"{_root_message(error)}"
        ) from error


def _refuse_unreadable(path: Path) -> None:
    try:
        with path.open("rb") as file:
            if not file.read(1):
                raise ValueError(f"{path} is empty")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error


def _refuse_broken_json(path: Path) -> None:
    """Raise for the first line of a file of one JSON object a line that is not one; return if all are."""
    if path.suffix == ".json":
        try:
            json.loads(path.read_bytes())
        except (json.JSONDecodeError, UnicodeDecodeError):
            pass  # not one document: it may be one object a line
        else:
            return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
            if not isinstance(value, dict):
                raise ValueError(f"{path}, line {number}: not a JSON object but {type(value).__name__}")


def _refuse_missing(dataset: Dataset, column: str, name: str) -> None:
    """Raise for the first sample whose value of a column is null or an empty list."""
    index = 0
    for batch in dataset.select_columns([column]).with_format("arrow").iter(10_000):
        values = batch[column]
        is_list = hasattr(values.type, "value_type")
        if values.null_count or is_list:
            for offset, value in enumerate(values):
                if not value.is_valid or (is_list and len(value.values) == 0):
                    raise ValueError(f"{name!r}, sample {index + offset}: {column!r} is empty")
        index += len(values)


def _refuse_padding(dataset: Dataset, name: str) -> None:
    if "attention_mask" not in dataset.column_names:
        return
    for index, mask in enumerate(dataset["attention_mask"]):
        if not all(mask):
            side = "left" if not mask[0] else "right"
            raise ValueError(
                f"{name!r}, sample {index}: padded on the {side} (attention_mask has zeros): write input_ids "
                "without "
                "padding, batches are padded as they are made"
            )


def _readable_endings() -> str:
    return ", ".join(_READERS) + " files"


def _root_message(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}".splitlines()[0]
