"""Bad data and bad weights, in one table: each is status 2 and one line that says what is wrong, before
anything is trained or written."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests.helpers.tiny_run import (
    ASSISTANT,
    CHAT_TEMPLATE,
    ROOT,
    TEXTS,
    USER,
    command_line,
    load_script,
    make_model_folder,
)
from tests.launchers.bad_inputs import assert_refused

Json = dict[str, Any]
GOOD = {"input_ids": [1, 2, 3]}
LINE = b'{"text": "good enough"}\n'
CHAT = [USER, ASSISTANT]


@pytest.fixture(scope="module")
def launcher() -> Any:
    return load_script(ROOT / "launchers" / "train.py")


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with weights, and a tokenizer with a chat template; nobody changes it."""
    folder = make_model_folder(tmp_path_factory.mktemp("saved") / "model")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def refused(launcher: Any, model: Path, folder: Path, word: str, *, rows: list[Json], **values: Any) -> str:
    out = folder / "out"
    defaults = {"output_dir": out, "chunk_check": False}
    if "dataset_name" not in values:
        data = folder / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        defaults["dataset_name"] = data
    arguments = command_line(model, TEXTS[:1], **defaults, **values)
    return assert_refused(launcher.main, arguments, word=word, output_dir=out)


def messages(*values: Any) -> list[Json]:
    return [{"messages": CHAT}, {"messages": list(values)}]


ROWS: dict[str, tuple[list[Json], str]] = {
    # Token ids
    "id too large": ([GOOD, {"input_ids": [1, 258, 3]}], "sample 1: the token id 258 is not among the 258"),
    "id negative": ([GOOD, GOOD, {"input_ids": [1, -1]}], "sample 2: the token id -1"),
    "id of 2^40": ([{"input_ids": [1, 2**40]}], "sample 0: the token id 1099511627776"),
    "id of 2^70": ([GOOD, {"input_ids": [1, 2**70]}], "sample 1: 'input_ids' holds 1.18"),
    "ids with a fraction": ([GOOD, {"input_ids": [1, 2.5]}], "sample 1: 'input_ids' holds 2.5: write whole"),
    "ids as floats": ([{"input_ids": [1.0, 2.0]}], "sample 0: 'input_ids' holds 1.0: write whole"),
    "ids with NaN": ([GOOD, {"input_ids": [1, float("nan")]}], "sample 1: 'input_ids' holds NaN"),
    "ids with null": ([GOOD, {"input_ids": [1, None, 2]}], "sample 1: 'input_ids' holds null"),
    "ids as text": ([GOOD, {"input_ids": ["a", "b"]}], "sample 1: 'input_ids' holds text ('a')"),
    "ids as one string": ([{"input_ids": "1 2 3"}], "sample 0: 'input_ids' is text, not a list"),
    "ids as one number": ([{"input_ids": 3}], "sample 0: 'input_ids' is a number, not a list"),
    "ids as truth values": ([{"input_ids": [True, False]}], "'input_ids' holds truth values"),
    "ids nested": ([{"input_ids": [[1, 2], [3, 4]]}], "sample 0: 'input_ids' holds a list ([1, 2])"),
    "ids nested in places": ([GOOD, {"input_ids": [1, [2], 3]}], "sample 1: 'input_ids' holds a list ([2])"),
    "ids of mixed kinds": ([GOOD, {"input_ids": 5}], "sample 1: 'input_ids' is a number, not a list"),
    "ids empty": ([GOOD, {"input_ids": []}], "sample 1: 'input_ids' is empty"),
    "ids missing": ([GOOD, {"other": 1}], "sample 1: 'input_ids' is empty"),
    "label too large": ([GOOD | {"labels": [1, 2, 999]}], "sample 0: the label 999 is not among the 258"),
    "label of -1": ([GOOD | {"labels": [-100, -1, 2]}], "sample 0: the label -1"),
    "label of -99": ([GOOD | {"labels": [1, 2, -99]}], "or -100 where nothing is to be learned"),
    "labels as floats": ([GOOD | {"labels": [1.0, 2.5, 3.0]}], "sample 0: 'labels' holds 2.5"),
    "labels shorter": ([GOOD | {"labels": [1, 2]}], "sample 0: 'labels' has 2 values, 'input_ids' has 3"),
    "labels longer": ([GOOD | {"labels": [1, 2, 3, 4]}], "'labels' has 4 values, 'input_ids' has 3"),
    "labels in some samples": ([GOOD | {"labels": [1, 2, 3]}, GOOD], "sample 1: 'labels' is empty"),
    "no label but -100": ([GOOD | {"labels": [-100] * 3}], "sample 0: no supervised token"),
    "attention_mask shorter": ([GOOD | {"attention_mask": [1, 1]}], "'attention_mask' has 2 values"),
    "attention_mask of 2": ([GOOD | {"attention_mask": [1, 2, 1]}], "'attention_mask' holds 2: write 0 or 1"),
    "padding on the right": ([GOOD | {"attention_mask": [1, 1, 0]}], "sample 0: padded on the right"),
    "completion_mask shorter": ([GOOD | {"completion_mask": [0, 1]}], "'completion_mask' has 2 values"),
    "completion_mask of -1": ([GOOD | {"completion_mask": [0, -1, 1]}], "'completion_mask' holds -1"),
    "assistant_masks longer": ([GOOD | {"assistant_masks": [0, 1, 1, 1]}], "'assistant_masks' has 4 values"),
    "seq_lengths of more": ([GOOD | {"seq_lengths": [2, 2]}], "'seq_lengths' add up to 4 tokens"),
    "one token each": ([{"input_ids": [1]}] * 3, "has one token: there is no next token to predict"),
    # Text
    "text as a number": ([{"text": "a"}, {"text": 5}], "sample 1: 'text' is a number, not text"),
    "text as numbers": ([{"text": 1}, {"text": 2}], "sample 0: 'text' is a number, not text"),
    "text as a list": ([{"text": ["a", "b"]}], "sample 0: 'text' is a list, not text"),
    "text as a mapping": ([{"text": {"a": "b"}}], "sample 0: 'text' is a mapping, not text"),
    "text as a truth value": ([{"text": True}], "sample 0: 'text' is a truth value, not text"),
    "text null": ([{"text": "a"}, {"text": None}], "sample 1: 'text' is empty"),
    "text null everywhere": ([{"text": None}], "sample 0: 'text' is empty"),
    "text of no characters": ([{"text": "ab"}, {"text": ""}], "sample 1 has one token"),
    "no usable column": ([{"question": "a", "answer": "b"}], "no usable column, only question, answer"),
    "prompt without completion": ([{"prompt": "a"}], "no usable column, only prompt"),
    "completion null": ([{"prompt": "a", "completion": None}], "sample 0: 'completion' is empty"),
    "prompt as a number": ([{"prompt": 3, "completion": "b"}], "sample 0: 'prompt' is a number"),
    "prompt text, completion messages": (
        [{"prompt": "a", "completion": CHAT}],
        "'prompt' is text, but 'completion' is a list: write both as text or both as messages",
    ),
    "prompt of strings": ([{"prompt": ["a"], "completion": ["b"]}], "message 0 of 'prompt' is text"),
    # Messages
    "messages as text": ([{"messages": "hello"}], "sample 0: 'messages' is text, not a list of messages"),
    "messages as text in places": ([{"messages": CHAT}, {"messages": "x"}], "sample 1: 'messages' is text"),
    "messages empty": (messages(), "sample 1: 'messages' is empty"),
    "messages null": ([{"messages": CHAT}, {"messages": None}], "sample 1: 'messages' is empty"),
    "message as text": (messages("hello"), "sample 1: message 0 of 'messages' is text, not a mapping"),
    "message without role": (messages({"content": "a"}), "sample 1: message 0 of 'messages' has no 'role'"),
    "message without content": (
        messages(USER, {"role": "assistant"}),
        "message 1 of 'messages' has no 'content'",
    ),
    "content null": (messages({"role": "user", "content": None}), "message 0 of 'messages' has no 'content'"),
    "content as a number": (messages({"role": "user", "content": 5}), "the 'content' of message 0"),
    "content as strings": (messages({"role": "user", "content": ["a"]}), "is a list, not text"),
    "role as a number": (messages({"role": 7, "content": "a"}), "the 'role' of message 0"),
    "messages of from and value": (
        [{"messages": [{"from": "user", "value": "a"}]}],
        "has 'from' and 'value': call the column 'conversations'",
    ),
    "conversations of role and content": (
        [{"conversations": CHAT}],
        "has 'role' and 'content': call the column 'messages'",
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows(launcher: Any, saved_model: Path, tmp_path: Path, name: str) -> None:
    rows, word = ROWS[name]
    refused(launcher, saved_model, tmp_path, word, rows=rows)


FILES: dict[str, tuple[str, bytes, str]] = {
    "empty": ("a.jsonl", b"", "a.jsonl is empty"),
    "only a line end": ("a.jsonl", b"\n", "a.jsonl"),
    "not JSON": ("a.jsonl", LINE + b"{broken\n", "a.jsonl, line 2: not JSON"),
    "half a line": ("a.jsonl", LINE * 2 + LINE[:-5], "a.jsonl, line 3: not JSON"),
    "a list a line": ("a.jsonl", LINE + b"[1]\n", "a.jsonl, line 2: not a JSON object but list"),
    "not UTF-8": ("a.jsonl", LINE * 2 + b'{"text": "\xff\xfe"}\n', "a.jsonl, line 3: not UTF-8"),
    "half a surrogate pair": ("a.jsonl", LINE + b'{"text": "\\ud83d!"}\n', "line 2: half a surrogate pair"),
    "messages not UTF-8": (
        "a.jsonl",
        b'{"messages": [{"role": "user", "content": "\xff"}]}\n',
        "a.jsonl, line 1: not UTF-8",
    ),
    "UTF-16": ("a.jsonl", LINE.decode().encode("utf-16"), "a.jsonl"),
    "csv without samples": ("a.csv", b"text\n", "a.csv has no samples"),
    "csv of other columns": ("a.csv", b"a,b\n1,2\n", "no usable column, only a, b"),
    "csv with an empty cell": ("a.csv", b"text,n\nx,1\n,2\n", "sample 1: 'text' is empty"),
    "csv of numbers": ("a.csv", b"text\n1\n2\n", "sample 0: 'text' is a number, not text"),
    "csv not UTF-8": ("a.csv", b"text\nx\n\xff\xfe\n", "a.csv, line 3: not UTF-8"),
    "csv with more cells": ("a.csv", b'text\n"a"\n"b","c","d"\n"e",1\n', "a.csv"),
    "txt not UTF-8": ("a.txt", b"one\ntwo \xe9\n", "a.txt, line 2: not UTF-8"),
    "no parquet": ("a.parquet", b"PAR0 and so on", "a.parquet cannot be read as parquet"),
    "no gzip": ("a.jsonl.gz", LINE, "a.jsonl.gz cannot be read"),
    "half of a gzip": ("a.jsonl.gz", gzip.compress(LINE * 999)[:-30], "a.jsonl.gz cannot be read"),
    "nothing in a gzip": ("a.jsonl.gz", gzip.compress(b""), "a.jsonl.gz is empty"),
    "not JSON in a gzip": ("a.jsonl.gz", gzip.compress(LINE + b"{\n"), "a.jsonl.gz, line 2: not JSON"),
    "not JSON in a bz2": ("a.json.bz2", bz2.compress(LINE + b"{\n"), "a.json.bz2, line 2: not JSON"),
    "not UTF-8 in an xz": ("a.txt.xz", lzma.compress(b"a\n\xff\n"), "a.txt.xz, line 2: not UTF-8"),
    "no xz": ("a.csv.xz", b"text\nx\n", "a.csv.xz cannot be read"),
    "another ending": ("a.docx", b"PK", "is a .docx file: write .jsonl"),
}


@pytest.mark.parametrize("name", FILES)
def test_files(launcher: Any, saved_model: Path, tmp_path: Path, name: str) -> None:
    file, content, word = FILES[name]
    (tmp_path / file).write_bytes(content)
    refused(launcher, saved_model, tmp_path, word, rows=[], dataset_name=tmp_path / file)


STREAMS: dict[str, tuple[str, bytes, str]] = {
    "empty": ("a.jsonl", b"", "a.jsonl is empty"),
    "not JSON": ("a.jsonl", b"{broken\n", "a.jsonl, line 1: not JSON"),
    "not UTF-8": ("a.jsonl", b'{"text": "\xff\xfe"}\n', "a.jsonl, line 1: not UTF-8"),
    "csv without samples": ("a.csv", b"text\n", "a.csv' has no samples"),
    "no usable column": ("a.csv", b"a,b\n1,2\n", "no usable column, only a, b"),
    "csv of numbers": ("a.csv", b"text\n1\n", "sample 0: 'text' is a number, not text"),
    "one token": ("a.jsonl", b'{"input_ids": [1]}\n', "sample 0: has one token"),
    "id too large": ("a.jsonl", b'{"input_ids": [1, 300]}\n', "sample 0: the token id 300"),
    "id of 2^70": ("a.jsonl", b'{"input_ids": [1, %d]}\n' % 2**70, "sample 0: 'input_ids' holds 1.18"),
    "labels shorter": (
        "a.jsonl",
        b'{"input_ids": [1, 2], "labels": [1]}\n',
        "sample 0: 'labels' has 1 values",
    ),
    "too long": (
        "a.jsonl",
        b'{"text": "%s"}\n' % (b"x" * 99),
        "sample 0: has 100 tokens, more than max_length=64",
    ),
    "messages as text": ("a.jsonl", b'{"messages": "hello"}\n', "sample 0: 'messages' is text"),
    "nothing in a gzip": ("a.jsonl.gz", gzip.compress(b""), "a.jsonl.gz is empty"),
}


@pytest.mark.parametrize("name", STREAMS)
def test_first_samples_of_streams(launcher: Any, saved_model: Path, tmp_path: Path, name: str) -> None:
    file, content, word = STREAMS[name]
    (tmp_path / file).write_bytes(content)
    refused(
        launcher, saved_model, tmp_path, word, rows=[], dataset_name=tmp_path / file, dataset_streaming=True
    )


STREAM_OPTIONS: dict[str, tuple[Json, str]] = {
    "without max_steps": ({"max_steps": -1}, "a stream does not say how long it is; write max_steps"),
    "chunk_packing": ({"chunk_packing": True}, "chunk_packing=True with dataset_streaming=True"),
    "by length": ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy=group_by_length"),
    "a pipeline": ({"pipeline_stages": 2}, "pipeline_stages=2"),
    "many workers": ({"dataloader_num_workers": 4}, "dataloader_num_workers=4 with dataset_streaming=True"),
    "split of messages": ({"long_samples": "split"}, "long_samples=split cuts plain text only"),
    "the option of a mixture": ({"streaming": True}, "write dataset_streaming"),
}


@pytest.mark.parametrize("name", STREAM_OPTIONS)
def test_what_streams_exclude(launcher: Any, saved_model: Path, tmp_path: Path, name: str) -> None:
    values, word = STREAM_OPTIONS[name]
    rows = [{"messages": CHAT}]
    refused(launcher, saved_model, tmp_path, word, rows=rows, **{"dataset_streaming": True, **values})


def test_what_is_no_file(launcher: Any, saved_model: Path, tmp_path: Path) -> None:
    """A pipe would be waited for, for ever."""
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "folder" / "train.jsonl")
    (tmp_path / "none").mkdir()
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text("{")
    for name, word in (
        ("pipe.jsonl", "pipe.jsonl is a pipe or a device"),
        ("folder", "train.jsonl is a pipe or a device"),
        ("none", "is a folder without .jsonl"),
        ("saved", "the dataset saved in"),
        ("absent.jsonl", "absent.jsonl' does not exist"),
    ):
        refused(launcher, saved_model, tmp_path, word, rows=[], dataset_name=tmp_path / name)


Edit = Callable[[Path], Any]


def weights(edit: Callable[[dict[str, torch.Tensor]], Any]) -> Edit:
    def apply(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        edit(state)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def config(**values: Any) -> Edit:
    def apply(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return apply


def file(name: str, change: Callable[[bytes], bytes | None]) -> Edit:
    def apply(folder: Path) -> None:
        content = change((folder / name).read_bytes())
        (folder / name).unlink() if content is None else (folder / name).write_bytes(content)

    return apply


class RunsCode:
    def __reduce__(self) -> Any:
        return os.mkdir, ("planted",)


def pickled(content: Callable[[Path], bytes | Any]) -> Edit:
    def apply(folder: Path) -> None:
        made = content(folder)
        (folder / "model.safetensors").unlink()
        path = folder / "pytorch_model.bin"
        path.write_bytes(made) if isinstance(made, bytes) else torch.save(made, path)

    return apply


def sharded(edit: Edit) -> Edit:
    def apply(folder: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(folder)
        (folder / "model.safetensors").unlink()
        model.save_pretrained(folder, max_shard_size="4KB")
        edit(folder)

    return apply


WEIGHTS: dict[str, tuple[Edit, str]] = {
    "one is missing": (
        weights(lambda state: state.pop("model.norm.weight")),
        "lack 1 weight(s) (model.norm.weight)",
    ),
    "the head is missing": (
        weights(lambda state: state.pop("lm_head.weight", None)),
        "lack 1 weight(s) (lm_head.w",
    ),
    "fewer layers in the files": (config(num_hidden_layers=3), "lack 9 weight(s) (model.layers.2."),
    "more layers in the files": (config(num_hidden_layers=1), "hold 9 weight(s) (model.layers.1."),
    "another vocabulary": (config(vocab_size=300), "is [258, 16] in its files, [300, 16] by its config.json"),
    "another width": (config(intermediate_size=64), "6 weight(s) have another shape"),
    "truncated": (
        file("model.safetensors", lambda b: b[:-100]),
        "model.safetensors is no whole file of weights",
    ),
    "garbage": (file("model.safetensors", lambda b: b"garbage" * 99), "model.safetensors is no whole file"),
    "empty": (file("model.safetensors", lambda b: b""), "model.safetensors is no whole file"),
    "none at all": (file("model.safetensors", lambda b: None), "no file named model.safetensors"),
    "a pickle that runs code": (pickled(lambda folder: {"a": RunsCode()}), "cannot be loaded"),
    "half of a pickle": (pickled(lambda folder: b"PK\x03\x04 and so on"), "cannot be loaded"),
    "a shard is missing": (
        sharded(lambda folder: sorted(folder.glob("*-00002-*"))[0].unlink()),
        "00002-of-",
    ),
    "a broken index": (
        sharded(file("model.safetensors.index.json", lambda b: b"{")),
        "is no index of weights",
    ),
    "config not JSON": (file("config.json", lambda b: b"{"), "gives no tokenizer"),
    "config of an unknown model": (config(model_type="nonsense"), "nonsense"),
    "config of a wrong type": (config(hidden_size="wide"), "hidden_size"),
    "no architectures": (config(architectures=None), "has no architectures"),
    "generation config not JSON": (
        lambda folder: (folder / "generation_config.json").write_text("{"),
        "generation_config.json' is no JSON",
    ),
    "tokenizer not JSON": (file("tokenizer.json", lambda b: b"{"), "gives no tokenizer"),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights(
    launcher: Any, saved_model: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    edit, word = WEIGHTS[name]
    model = tmp_path / "model"
    shutil.copytree(saved_model, model)
    if "head" in name:  # the model of this folder is tied, as most small ones are
        config(tie_word_embeddings=False)(model)
    edit(model)
    refused(launcher, model, tmp_path, word, rows=TEXTS[:2], from_scratch=False)
    assert not (tmp_path / "planted").exists()


def more_tokens(model: Path, folder: Path, count: int) -> Path:
    shutil.copytree(model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<new{number}>" for number in range(count)])
    tokenizer.save_pretrained(folder)
    return folder


def test_a_tokenizer_larger_than_the_model(
    launcher: Any, saved_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only where its new tokens are used; else a line says that they are there."""
    model = more_tokens(saved_model, tmp_path / "model", 3)
    rows = [{"text": "plain"}, {"text": "with <new2> in it"}]
    refused(launcher, model, tmp_path, "sample 1: the token id 260", rows=rows)
    arguments = command_line(model, rows[:1] * 2, output_dir=tmp_path / "out", max_steps=1, chunk_check=False)
    assert launcher.main(arguments) == 0
    assert "tokenizer has 261 tokens, the model's embedding 258: no sample uses" in capsys.readouterr().out


def test_a_padding_token_outside_of_the_embedding(launcher: Any, saved_model: Path, tmp_path: Path) -> None:
    model = more_tokens(saved_model, tmp_path / "model", 1)
    values: Json = {"pad_token": "<new0>", "per_device_train_batch_size": 2, "output_dir": tmp_path / "out"}
    rows = [{"text": "one"}, {"text": "one more"}]
    refused(
        launcher,
        model,
        tmp_path,
        "the padding token of the tokenizer: the token id 258",
        rows=rows,
        **{key: value for key, value in values.items() if key != "output_dir"},
    )
    equal = command_line(model, rows[:1] * 2, max_steps=1, chunk_check=False, **values)
    assert launcher.main(equal) == 0, "rows of the same length are not padded"
