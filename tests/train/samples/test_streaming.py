"""Samples that stream: trained on as those of a whole dataset, checked as they come, and resumed exactly."""

from __future__ import annotations

import json
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from chunkdist.errors import BadSampleError
from chunkdist.train.build import build_trainer
from chunkdist.train.options.arguments import parse_options
from tests.helpers.tiny_run import ASSISTANT, CHAT_TEMPLATE, ROOT, USER, command_line, load_script, write_rows

TEXTS = [{"text": f"def f({n * 37}):\n    return {n}\n" * (1 + n % 2)} for n in range(8)]
CHAT = [USER, ASSISTANT]
ROWS: dict[str, list[dict[str, Any]]] = {
    "text": TEXTS,
    "text and other columns": [row | {"source": "web", "score": 0.5} for row in TEXTS],
    "prompt and completion": [{"prompt": "a question", "completion": f"answer {n}"} for n in range(4)],
    "prompt and completion as messages": [{"prompt": [USER], "completion": [ASSISTANT]}] * 2,
    "messages": [{"messages": CHAT}, {"messages": [USER, ASSISTANT, USER, ASSISTANT]}],
    "messages with tool calls": [
        {"messages": CHAT},
        {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}]},
    ],
    "messages and tools": [{"messages": CHAT, "tools": '[{"name": "f"}]'}] * 2,
    "conversations": [
        {"conversations": [{"from": "user", "value": "a"}, {"from": "assistant", "value": "b"}]}
    ],
    "input_ids": [{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5]}],
    "input_ids with labels and a mask": [
        {"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "attention_mask": [1, 1, 1]},
        {"input_ids": [4, 5], "labels": [-100, 5], "attention_mask": [1, 1]},
    ],
    "input_ids with a completion_mask": [{"input_ids": [1, 2, 3], "completion_mask": [0, 0, 1]}],
}


@pytest.fixture(scope="module")
def launcher() -> Any:
    return load_script(ROOT / "launchers" / "train.py")


def trainer_of(model: Path, rows: list[dict[str, Any]], **values: Any) -> Any:
    (model.parent / "template.jinja").write_text(CHAT_TEMPLATE)
    values.setdefault("chat_template_path", model.parent / "template.jinja")
    values.setdefault("chunk_check", False)
    return build_trainer(parse_options(command_line(model, rows, **values)))[0]


def samples_of(trainer: Any, count: int | None = None) -> list[dict[str, list[int]]]:
    return [
        {key: list(row[key]) for key in ("input_ids", "labels")}
        for row in islice(trainer.train_dataset, count)
    ]


@pytest.mark.parametrize("kind", ROWS)
def test_each_kind_of_sample_streams_as_plain_trl_prepares_it(tiny_model: Path, kind: str) -> None:
    from datasets import load_dataset
    from transformers import AutoTokenizer
    from trl import SFTTrainer

    rows = ROWS[kind]
    values: dict[str, Any] = {"completion_only_loss": True} if "completion" in kind else {}
    checked = trainer_of(tiny_model, rows, **values)
    streamed = trainer_of(tiny_model, rows, dataset_streaming=True, **values)
    assert samples_of(streamed, len(rows)) == samples_of(checked)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    plain = SFTTrainer(
        model=checked.model,
        args=checked.args,
        train_dataset=load_dataset("json", data_files=str(tiny_model.parent / "data.jsonl"))["train"],
        processing_class=tokenizer,
    )
    assert samples_of(plain) == samples_of(checked)


def test_a_stream_begins_again_where_it_ends_and_is_mixed_anew(tiny_model: Path) -> None:
    trainer = trainer_of(tiny_model, TEXTS, dataset_streaming=True)
    whole = samples_of(trainer, 24)
    assert whole[:8] == whole[8:16] == whole[16:]
    mixed = samples_of(trainer_of(tiny_model, TEXTS, dataset_streaming=True, shuffle_dataset=True), 24)
    epochs = [mixed[:8], mixed[8:16], mixed[16:]]
    assert epochs[0] != epochs[1] != epochs[2]
    assert all(sorted(map(str, epoch)) == sorted(map(str, whole[:8])) for epoch in epochs)


def test_long_samples_of_a_stream(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [TEXTS[0], {"text": "x" * 150}, TEXTS[2]]
    short = [len(row["text"]) + 1 for row in (TEXTS[0], TEXTS[2])]
    for what, lengths in (
        ("truncate", [short[0], 64, short[1]]),
        ("drop", short),
        ("split", [short[0], 64, 64, 23, short[1]]),
    ):
        trainer = trainer_of(tiny_model, rows, dataset_streaming=True, long_samples=what)
        found = [len(row["input_ids"]) for row in samples_of(trainer, len(lengths))]
        assert found == lengths
        said = [line for line in capsys.readouterr().out.splitlines() if "longer than" in line]
        assert said == [
            "train data, sample 1: longer than max_length=64 tokens: what becomes of it and of all such "
            f"samples is long_samples={what}"
        ]
    end = trainer_of(
        tiny_model, rows, dataset_streaming=True, long_samples="truncate", truncation_mode="keep_end"
    )
    assert samples_of(end, 2)[1]["input_ids"][-1] == 256  # the end of the text
    with pytest.raises(BadSampleError, match="long_samples=drop leaves no sample"):
        trainer_of(tiny_model, [{"text": "x" * 150}] * 2, dataset_streaming=True, long_samples="drop")


def losses(launcher: Any, model: Path, rows: list[dict[str, Any]], **values: Any) -> list[float]:
    arguments = command_line(model, rows, chunk_check=False, dataset_streaming=True, **values)
    assert launcher.main(arguments) == 0
    lines = (Path(values["output_dir"]) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.parametrize("more", [{"shuffle_dataset": True}, {"packing": True, "dataloader_num_workers": 1}])
def test_a_resumed_stream_goes_on_behind_what_was_seen(
    launcher: Any, tiny_model: Path, tmp_path: Path, more: dict[str, Any]
) -> None:
    """Eight samples, two a micro-batch and two of these a step: a checkpoint after one epoch and a half."""
    common = {"max_steps": 5, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, **more}
    saving = {"save_strategy": "steps", "save_steps": 3}
    whole = losses(launcher, tiny_model, TEXTS, output_dir=tmp_path / "whole", **saving, **common)
    assert len(set(whole)) == 5
    resumed = tmp_path / "resumed"
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", resumed / "checkpoint-3")
    for path in (resumed / "checkpoint-3").glob("*state.json"):
        path.write_text(path.read_text().replace(str(tmp_path / "whole"), str(resumed)))
    values = {"resume_from_checkpoint": resumed / "checkpoint-3", "output_dir": resumed}
    assert losses(launcher, tiny_model, TEXTS, **values, **common) == whole[3:]
    beginning = [TEXTS[0]] * 12 + TEXTS  # other samples before the checkpoint do not matter, those behind do
    other = losses(launcher, tiny_model, beginning, **values, **common)
    assert other != whole[3:]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("bad", "word"),
    [
        ({"text": 5}, "sample 3: 'text' is a number, not text: write a string"),
        ({"text": "x" * 99}, "sample 3: has 100 tokens, more than max_length=64"),
        ({"text": ""}, "sample 3: has one token"),
    ],
)
def test_a_bad_sample_ends_the_run_with_its_number(
    launcher: Any, tiny_model: Path, capsys: pytest.CaptureFixture[str], bad: Any, word: str, workers: int
) -> None:
    rows = [*TEXTS[:3], bad, *TEXTS]
    values = {"dataset_streaming": True, "max_steps": 9, "dataloader_num_workers": workers}
    assert launcher.main(command_line(tiny_model, rows, chunk_check=False, **values)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("chunkdist: ")]
    assert len(lines) == 1
    assert word in lines[0]
    assert "Traceback" not in lines[0]
    assert not (tiny_model.parent / "out" / "model.safetensors").exists()


def test_a_bad_id_and_a_broken_line_in_the_middle(tiny_model: Path, tmp_path: Path) -> None:
    rows = [{"input_ids": [1, 2, 3]}] * 3 + [{"input_ids": [1, 2, 999]}]
    with pytest.raises(BadSampleError, match="train data, sample 3: the token id 999"):
        trainer_of(tiny_model, rows, dataset_streaming=True, max_steps=9).train()
    blocks = [{"text": "short", "other": "x" * 40_000}] * 300  # more than is read at a time
    path = write_rows(tmp_path / "long.jsonl", blocks)
    with path.open("a") as file:
        file.write("{broken\n")
    trainer = trainer_of(tiny_model, [], dataset_streaming=True, dataset_name=path)
    rows_read = iter(trainer.train_dataset)
    with pytest.raises(ValueError, match=r"long\.jsonl, line 301: not JSON"):
        list(islice(rows_read, 301))


def test_evaluation_streams_too(launcher: Any, tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "both"
    folder.mkdir()
    for split in ("train", "test"):
        write_rows(folder / f"{split}.jsonl", TEXTS[:4])
    values = {"dataset_name": folder, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 1}
    found = [
        trainer_of(tiny_model, [], dataset_streaming=streams, **values).evaluate()["eval_loss"]
        for streams in (False, True)
    ]
    assert found[0] == found[1]
