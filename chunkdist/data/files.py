"""Data files, read as `datasets` reads them, compressed or not; a fault names the file, and its line."""

from __future__ import annotations

import bz2
import csv
import gzip
import importlib.util
import json
import lzma
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

READERS = {
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "text",
}
_OPENERS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
}
COMPRESSIONS = (*_OPENERS, ".zst")


def reader_of(path: Path) -> str | None:
    """The reader of `datasets` for a file, by its ending (`.jsonl`, `.csv.gz`); `None`: there is none."""
    ending = _ending(path)
    is_compressed = path.suffix.lower() in COMPRESSIONS
    return None if is_compressed and ending == ".parquet" else READERS.get(ending)


def _ending(path: Path) -> str:
    """In lower case, without that of a compression."""
    ending = path.suffix.lower()
    return Path(path.stem).suffix.lower() if ending in COMPRESSIONS else ending


def readable_endings() -> str:
    return f"{', '.join(READERS)} files, these but .parquet also as {', '.join(COMPRESSIONS)}"


def load_file(path: Path, *, streaming: bool) -> dict[str, Dataset | IterableDataset]:
    """The one split of a file, `train`."""
    import datasets

    if not path.exists():
        raise ValueError(f"dataset_name='{path}' does not exist")
    reader = reader_of(path)
    assert reader is not None
    refuse_unreadable(path)
    _refuse_cells_without_column(path)
    separator = {"sep": "\t"} if _ending(path) == ".tsv" else {}
    try:
        loaded = datasets.load_dataset(reader, data_files=str(path), streaming=streaming, **separator)
    except Exception as error:
        refuse_broken(path)
        if "corresponds to no data" in str(error):  # datasets 5.2, of a file of one line of column names
            raise ValueError(f"{path} has no samples") from error
        raise ValueError(f"{path} cannot be read as {reader}: {root_message(error)}") from error
    return dict(loaded)


def load_folder(path: Path, *, streaming: bool) -> dict[str, Dataset | IterableDataset]:
    """The splits of a folder of files, or of what `save_to_disk` has written."""
    import datasets

    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        try:
            saved = datasets.load_from_disk(str(path))
        except Exception as error:
            raise ValueError(f"the dataset saved in {path} cannot be read: {root_message(error)}") from error
        splits = dict(saved) if isinstance(saved, datasets.DatasetDict) else {"train": saved}
        return {name: split.to_iterable_dataset() for name, split in splits.items()} if streaming else splits
    files = files_of(path)
    if not files:
        raise ValueError(f"dataset_name='{path}' is a folder without {readable_endings()}")
    kinds = sorted({_ending(file) for file in files})
    if len({".json" if kind == ".jsonl" else kind for kind in kinds}) > 1:
        raise ValueError(
            f"dataset_name='{path}' has files of several kinds ({', '.join(kinds)}), of which one would "
            "be read: leave one kind in it, or name a file"
        )
    for file in files:
        refuse_unreadable(file)
        _refuse_cells_without_column(file)
    try:
        return dict(datasets.load_dataset(str(path), streaming=streaming))
    except Exception as error:
        for file in files:
            refuse_broken(file)
        raise ValueError(f"the files in {path} cannot be read: {root_message(error)}") from error


def files_of(path: Path) -> list[Path]:
    """The data files that a name stands for: itself, or those in the folder."""
    if not path.is_dir():
        return [path] if path.exists() else []
    return sorted(file for file in path.rglob("*") if reader_of(file) is not None and not file.is_dir())


def refuse_broken(path: Path) -> None:
    """Raises for the first line of a file of text that is not UTF-8 or, in a file of JSON, not an object.

    Returns where there is none.
    """
    reader = reader_of(path)
    if reader in (None, "parquet"):
        return
    number = 1
    try:
        if reader == "json" and ".json" in path.suffixes and _is_one_document(path):
            return
        for number, line in _lines(path):
            fault = _line_fault(line, is_json=reader == "json")
            if fault is not None:
                raise ValueError(f"{path}, line {number}: {fault}")
    except (OSError, EOFError, lzma.LZMAError) as error:  # of decompressing
        raise ValueError(f"{path} cannot be read after line {number}: {root_message(error)}") from error


def _refuse_cells_without_column(path: Path) -> None:
    """Raises where the first row of a table has more cells than its header: pandas takes the first ones for
    an index, and datasets leaves them out."""
    if reader_of(path) != "csv":
        return
    lines = (line.decode(errors="replace") for _, line in _lines(path))
    first: list[list[str]] = []
    with suppress(OSError, EOFError, lzma.LZMAError, csv.Error):  # datasets meets it, too
        first = list(islice(csv.reader(lines, delimiter="\t" if _ending(path) == ".tsv" else ","), 2))
    if len(first) == 2 and len(first[1]) > len(first[0]):
        raise ValueError(
            f"{path}, line 2: has {len(first[1])} cells, and the header {len(first[0])}: put quotation marks "
            "around text with a separator in it"
        )


def root_message(error: BaseException) -> str:
    """The first line of what an error began with."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}".splitlines()[0]


def refuse_unreadable(path: Path) -> None:
    """Raises for what is no file with something in it; a pipe would be waited for."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ValueError(f"{path} is a pipe or a device: write the name of a file")
        with path.open("rb") as file:
            if not file.read(1):
                raise ValueError(f"{path} is empty")
        if _opener(path) is None:
            return
        with _open(path) as content:
            if not content.read(1):
                raise ValueError(f"{path} is empty")
    except (OSError, EOFError, lzma.LZMAError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise ValueError(f"{path} cannot be read: {why}") from error


def _opener(path: Path) -> Callable[[Path], Any] | None:
    ending = path.suffix.lower()
    if ending == ".zst":
        if importlib.util.find_spec("zstandard") is None:
            raise ValueError(f"{path} needs a package to be read: pip install zstandard")
        import zstandard  # type: ignore[import-not-found, import-untyped, unused-ignore]

        return lambda name: zstandard.open(name, "rb")
    return _OPENERS.get(ending)


def _open(path: Path) -> BinaryIO:
    opener = _opener(path)
    return cast(BinaryIO, path.open("rb") if opener is None else opener(path))


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with _open(path) as file:
        yield from enumerate(file, start=1)


def _is_one_document(path: Path) -> bool:
    """Whether a .json file is one valid document, not one object a line."""
    with _open(path) as file:
        content = file.read()
    try:
        json.loads(content)
    except (json.JSONDecodeError, UnicodeDecodeError):
        return False
    return not _has_lone_surrogate(json.loads(content))


def _line_fault(line: bytes, *, is_json: bool) -> str | None:
    try:
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return f"not UTF-8 (byte {line[error.start]:#04x} at {error.start}): save the file as UTF-8"
    if not is_json or not text.strip():
        return None
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        return f"not JSON ({error})"
    if not isinstance(value, dict):
        return f"not a JSON object but {type(value).__name__}"
    if _has_lone_surrogate(value):
        return "half a surrogate pair (\\ud800 to \\udfff alone), which is no character: take it out"
    return None


def _has_lone_surrogate(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False
