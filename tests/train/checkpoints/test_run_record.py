"""What a run is told by: its id, and the options that decide what is trained."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from trl import SFTConfig

from chunkdist.train.checkpoints import run_record
from chunkdist.train.checkpoints.fingerprints import folder_fingerprint, samples_fingerprint
from chunkdist.train.checkpoints.run_record import RECORD, RunRecord, changed_steps, refuse_other_options
from chunkdist.train.options.arguments import ModelArguments, TrainArguments, parse_options
from tests.helpers.tiny_run import TEXTS, command_line, make_model_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("record") / "model")


def record_of(model: Path, num_ranks: int = 1, **values: Any) -> RunRecord:
    return RunRecord.of(parse_options(command_line(model, TEXTS, report_to="none", **values)), num_ranks)


def test_a_record_comes_back_as_it_was_written(model: Path, tmp_path: Path) -> None:
    record = record_of(model).with_samples("abc")
    assert record.run != record_of(model).run
    record.write(tmp_path / "new")
    assert [path.name for path in (tmp_path / "new").iterdir()] == [RECORD]
    assert RunRecord.read(tmp_path / "new") == record
    refuse_other_options(tmp_path / "new", record)
    assert changed_steps(tmp_path / "new", record) is None
    for text in ("", "{", "[]", '{"run": "x"}'):
        (tmp_path / "new" / RECORD).write_text(text)
        assert RunRecord.read(tmp_path / "new") is None


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"learning_rate": 2.0}, "learning_rate was 0.01 and is 2.0"),
        ({"adam_beta2": 0.5}, "adam_beta2 was 0.999 and is 0.5"),
        ({"lr_scheduler_type": "cosine"}, "lr_scheduler_type was linear and is cosine"),
        ({"warmup_steps": 3}, "warmup_steps was 0 and is 3"),
        ({"max_grad_norm": 0.5}, "max_grad_norm was 1.0 and is 0.5"),
        ({"bf16": True}, "bf16 was False and is True"),
        ({"data_seed": 3}, r"data_seed \(or seed\) was 42 and is 3"),
        ({"neftune_noise_alpha": 5}, "neftune_noise_alpha was None and is 5"),
        ({"loss_type": "dft"}, "loss_type was .* and is dft"),
        ({"train_sampling_strategy": "sequential"}, "train_sampling_strategy was random and is sequential"),
        ({"chunk_method": "spaco"}, "chunk_method was seco or none and is spaco"),
        ({"use_peft": True}, "use_peft was False and is True"),
        ({"use_peft": True, "lora_r": 3}, "lora_r was 16 and is 3; use_peft was False"),
        ({"per_device_train_batch_size": 3}, "per_device_train_batch_size .* was 1 and is 3"),
    ],
)
def test_what_decides_the_training_is_compared(
    model: Path, tmp_path: Path, values: dict[str, Any], said: str
) -> None:
    record_of(model).write(tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path} cannot go on, .*{said}"):
        refuse_other_options(tmp_path, record_of(model, **values))


@pytest.mark.parametrize(
    "values",
    [
        {"logging_steps": 7, "save_steps": 3, "eval_steps": 5, "run_name": "other"},
        {"chunk_size": 8, "layers_per_group": 2, "chunk_offload": "host", "chunk_check": False},
        {"dataloader_num_workers": 2, "hub_token": "x", "save_total_limit": 1, "output_dir": "elsewhere"},
    ],
)
def test_what_does_not_is_not(model: Path, tmp_path: Path, values: dict[str, Any]) -> None:
    record_of(model).write(tmp_path)
    refuse_other_options(tmp_path, record_of(model, **values))
    ranks = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    record_of(model, num_ranks=4).write(tmp_path)
    refuse_other_options(tmp_path, record_of(model, num_ranks=1, **ranks))


def test_another_length_is_taken_over_and_said(model: Path, tmp_path: Path) -> None:
    record_of(model).write(tmp_path)
    longer = record_of(model, max_steps=9)
    refuse_other_options(tmp_path, longer)
    assert str(changed_steps(tmp_path, longer)).startswith("max_steps was 2 and is 9: from here on")


def test_every_free_option_exists() -> None:
    """An option that transformers renames would be compared from then on."""
    known = {field.name for kind in (TrainArguments, ModelArguments) for field in dataclasses.fields(kind)}
    assert known >= run_record._FREE
    assert {field.name for field in dataclasses.fields(SFTConfig)} & run_record._FREE


def test_models_are_compared_by_what_they_hold(model: Path, tmp_path: Path) -> None:
    first = make_model_folder(tmp_path / "first")
    second = make_model_folder(tmp_path / "second")
    assert folder_fingerprint(str(first), None) == folder_fingerprint(str(second), "main")
    (second / "model.safetensors").write_bytes(b"0" * 2**22)
    with_weights = folder_fingerprint(str(second), None)
    assert folder_fingerprint(str(first), None) != with_weights
    (second / "model.safetensors").write_bytes(b"0" * (2**22 - 1) + b"1")
    assert folder_fingerprint(str(second), None) != with_weights
    assert folder_fingerprint("some/model", "v1") == "some/model v1"


def test_samples_are_compared_by_what_they_hold() -> None:
    rows = {"input_ids": [[1, 2], [3], [4, 5, 6]], "labels": [[1, -100], [3], [4, 5, 6]]}

    def name(**changed: Any) -> str | None:
        return samples_fingerprint(Dataset.from_dict({**rows, **changed}))

    assert name() == name(text=["not", "looked", "at"])
    assert samples_fingerprint(Dataset.from_dict(rows).select([0, 1, 2])) == name()
    different = [
        name(),
        name(labels=[[1, 2], [3], [4, 5, 6]]),
        name(input_ids=[[1], [2, 3], [4, 5, 6]]),
        name(assistant_masks=[[0, 1], [1], [1, 1, 1]]),
        samples_fingerprint(Dataset.from_dict(rows).select([1, 0, 2])),
        samples_fingerprint(Dataset.from_dict(rows).select([0, 1])),
        samples_fingerprint(Dataset.from_dict({"input_ids": rows["input_ids"]})),
    ]
    assert len(set(different)) == len(different)
    assert samples_fingerprint(Dataset.from_dict(rows).to_iterable_dataset()) is None
    many = Dataset.from_dict({"input_ids": [[number] for number in range(2500)]})
    last = many.to_list()
    last[-1]["input_ids"] = [0]
    assert samples_fingerprint(many) != samples_fingerprint(Dataset.from_list(last))
