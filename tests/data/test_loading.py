"""Datasets by name: each kind of source is read, each fault gets one line that names the file, line or
sample."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from chunkdist.data.loading import is_conversational, load_mixture, load_splits, pick_split, sample_kind

ROWS = [{"text": "one"}, {"text": "two"}]


def jsonl(path: Path, *rows: Any) -> str:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return str(path)


def kind_of(rows: list[dict[str, Any]]) -> str:
    return sample_kind(Dataset.from_list(rows), text_field="text", name="it")


CONTENTS = {
    ".jsonl": "".join(json.dumps(row) + "\n" for row in ROWS),
    ".json": json.dumps(ROWS),
    ".csv": "text\none\ntwo\n",
    ".tsv": "text\none\ntwo\n",
    ".txt": "one\ntwo\n",
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("compression", ["", ".gz", ".bz2", ".xz"])
@pytest.mark.parametrize("ending", CONTENTS)
def test_a_file_is_one_train_split(tmp_path: Path, ending: str, compression: str, streaming: bool) -> None:
    path = tmp_path / f"data{ending}{compression}"
    compress = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}[compression]
    path.write_bytes(compress(CONTENTS[ending].encode()))
    assert list(load_splits(str(path), streaming=streaming)["train"]) == ROWS


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_and_cells_between_tabs(tmp_path: Path, streaming: bool) -> None:
    Dataset.from_list(ROWS).to_parquet(tmp_path / "data.parquet")
    assert list(load_splits(str(tmp_path / "data.parquet"), streaming=streaming)["train"]) == ROWS
    (tmp_path / "data.tsv").write_text("prompt\tcompletion\na, b\tc\n")
    cells = list(load_splits(str(tmp_path / "data.tsv"), streaming=streaming)["train"])
    assert cells == [{"prompt": "a, b", "completion": "c"}]


def test_files_of_several_datasets_are_looked_at(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    broken = jsonl(tmp_path / "broken.jsonl", ROWS[0], "{\n")

    def load(*files: Any) -> Any:
        from trl import DatasetMixtureConfig, get_dataset

        parts: list[Any] = [{"path": "json", "data_files": names} for names in files]
        mixture = DatasetMixtureConfig(datasets=parts)
        return load_mixture(lambda: get_dataset(mixture), mixture.datasets)

    whole = jsonl(tmp_path / "whole.jsonl", *ROWS)
    assert load(whole, [whole])["train"].to_list() == ROWS * 2
    with pytest.raises(ValueError, match=r"pipe\.jsonl is a pipe"):
        load(whole, {"train": [str(tmp_path / "pipe.jsonl")]})
    with pytest.raises(ValueError, match=r"broken\.jsonl, line 2: not JSON"):
        load(broken)
    with pytest.raises(ValueError, match="datasets cannot be read: "):
        load(str(tmp_path / "absent.jsonl"))


def test_a_package_that_a_compression_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from chunkdist.data import files

    monkeypatch.setattr(files.importlib.util, "find_spec", lambda name: None)
    (tmp_path / "data.jsonl.zst").write_bytes(b"something")
    with pytest.raises(
        ValueError, match=r"data\.jsonl\.zst needs a package to be read: pip install zstandard"
    ):
        load_splits(str(tmp_path / "data.jsonl.zst"))


def test_folders_of_files_and_of_save_to_disk(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    jsonl(tmp_path / "files" / "train.jsonl", *ROWS)
    jsonl(tmp_path / "files" / "test.jsonl", ROWS[0])
    splits = load_splits(str(tmp_path / "files"))
    assert (len(splits["train"]), len(splits["test"])) == (2, 1)
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    assert load_splits(str(tmp_path / "one"))["train"].to_list() == ROWS
    DatasetDict(valid=Dataset.from_list(ROWS)).save_to_disk(tmp_path / "many")
    assert list(load_splits(str(tmp_path / "many"))) == ["valid"]


def test_a_folder_of_several_kinds(tmp_path: Path) -> None:
    """Of which datasets would read the commonest."""
    jsonl(tmp_path / "a.jsonl", *ROWS)
    for name in ("b.csv", "c.csv"):
        (tmp_path / name).write_text("text\none\n")
    with pytest.raises(ValueError, match=r"has files of several kinds \(\.csv, \.jsonl\)"):
        load_splits(str(tmp_path))
    (tmp_path / "a.jsonl").unlink()
    assert load_splits(str(tmp_path))["train"].column_names == ["text"]


def test_more_cells_than_columns(tmp_path: Path) -> None:
    """pandas takes the first ones for an index."""
    table = tmp_path / "t.csv"
    table.write_text("text\nhello, world\nfoo, bar\n")
    for name in (table, tmp_path):
        with pytest.raises(ValueError, match=r"t\.csv, line 2: has 2 cells, and the header 1"):
            load_splits(str(name))
    table.write_text('text\n"hello, world"\n')
    assert load_splits(str(table))["train"].to_list() == [{"text": "hello, world"}]
    (tmp_path / "u.TSV").write_text("text\na, b\n")
    assert load_splits(str(tmp_path / "u.TSV"))["train"].to_list() == [{"text": "a, b"}]


def test_the_standard_library_has_a_train_and_a_test_split() -> None:
    splits = load_splits("python-stdlib", corpus_max_bytes=800_000)
    assert set(splits) == {"train", "test"}
    assert splits["train"].column_names == ["text"]


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    name = jsonl(tmp_path / "bad.jsonl", *ROWS, '{"text": "thr\n', *ROWS)
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 3: not JSON"):
        load_splits(name)
    with pytest.raises(ValueError, match=r"list\.jsonl, line 2: not a JSON object but list"):
        load_splits(jsonl(tmp_path / "list.jsonl", ROWS[0], "[1]\n"))


def test_files_that_are_no_datasets(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.jsonl' does not exist"):
        load_splits(str(tmp_path / "none.jsonl"))
    with pytest.raises(ValueError, match="does not exist"):
        load_splits(str(tmp_path / "nowhere"))
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match="is empty"):
        load_splits(str(tmp_path / "empty.jsonl"))
    (tmp_path / "it.pdf").write_text("a,b\n")
    with pytest.raises(ValueError, match=r"\.pdf file: write \.jsonl"):
        load_splits(str(tmp_path / "it.pdf"))
    (tmp_path / "header.csv").write_text("text\n")
    with pytest.raises(ValueError, match=r"header\.csv has no samples"):
        load_splits(str(tmp_path / "header.csv"))
    (tmp_path / "broken.parquet").write_text("PAR0")
    with pytest.raises(ValueError, match=r"broken\.parquet cannot be read as parquet"):
        load_splits(str(tmp_path / "broken.parquet"))
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="is a folder without"):
        load_splits(str(tmp_path / "folder"))
    jsonl(tmp_path / "folder" / "train.jsonl", "{\n")
    with pytest.raises(ValueError, match=r"train\.jsonl, line 1: not JSON"):
        load_splits(str(tmp_path / "folder"))


def test_an_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = jsonl(tmp_path / "closed.jsonl", *ROWS)

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", name)

    monkeypatch.setattr(Path, "open", refuse)  # tests may run as root, whom permissions do not stop
    with pytest.raises(ValueError, match=r"closed\.jsonl cannot be read: Permission denied"):
        load_splits(name)


def test_a_name_that_the_hub_does_not_give() -> None:
    with pytest.raises(ValueError, match="neither a file or folder here nor a dataset that the Hub gives"):
        load_splits("nobody/nothing-at-all")


def test_a_split_that_is_not_there() -> None:
    splits = {"train": Dataset.from_list(ROWS)}
    assert pick_split(splits, "train", option="dataset_train_split", name="it") is splits["train"]
    with pytest.raises(
        ValueError, match=r"dataset_test_split='test' is not a split of 'it': write one of train"
    ):
        pick_split(splits, "test", option="dataset_test_split", name="it")


def test_kinds() -> None:
    message = [{"role": "user", "content": "hi"}]
    assert kind_of(ROWS) == "text"
    assert kind_of([{"messages": message}]) == "messages"
    assert kind_of([{"prompt": "a", "completion": "b"}]) == "prompt_completion"
    assert kind_of([{"input_ids": [1, 2]}]) == "tokens"
    pairs = Dataset.from_list([{"prompt": message, "completion": message}])
    assert is_conversational(pairs[0], "prompt_completion")
    assert not is_conversational({"prompt": "a", "completion": "b"}, "prompt_completion")


def test_samples_that_cannot_be_used() -> None:
    with pytest.raises(ValueError, match="no usable column, only question, answer"):
        kind_of([{"question": "a", "answer": "b"}])
    with pytest.raises(ValueError, match="has no samples"):
        sample_kind(Dataset.from_dict({"text": []}), text_field="text", name="it")
    with pytest.raises(ValueError, match="sample 1: 'text' is empty"):
        kind_of([{"text": "a"}, {"text": None}])
    with pytest.raises(ValueError, match="sample 2: 'messages' is empty"):
        kind_of([{"messages": [{"role": "user", "content": "hi"}]}] * 2 + [{"messages": []}])


def test_left_padding_is_refused() -> None:
    with pytest.raises(ValueError, match="sample 1: padded on the left"):
        kind_of(
            [
                {"input_ids": [1, 2], "attention_mask": [1, 1]},
                {"input_ids": [0, 2], "attention_mask": [0, 1]},
            ],
        )
