"""What options leave of the data, and a chunk size that cuts nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from chunkdist.train.build import build_trainer
from chunkdist.train.options.amounts import chunk_size_line
from chunkdist.train.options.arguments import parse_options
from chunkdist.train.options.combinations import check_options
from tests.helpers.tiny_run import TEXTS, command_line, write_rows


def test_a_loader_that_drops_everything(tiny_model: Path) -> None:
    common = {"dataloader_drop_last": True, "per_device_train_batch_size": 3}
    with pytest.raises(
        ValueError, match=r"drops all 2 samples of the train data, a batch of 1 rank\(s\) has 3"
    ):
        build_trainer(parse_options(command_line(tiny_model, TEXTS[:2], **common)))
    build_trainer(parse_options(command_line(tiny_model, TEXTS[:2] * 2, **common)))


def test_evaluation_that_drops_everything(tiny_model: Path) -> None:
    folder = tiny_model.parent / "both"
    folder.mkdir()
    for split in ("train", "test"):
        write_rows(folder / f"{split}.jsonl", TEXTS[:2])
    values = {"dataset_name": folder, "eval_strategy": "epoch", "dataloader_drop_last": True}
    with pytest.raises(ValueError, match=r"drops all 2 samples of the eval data.*per_device_eval_batch_size"):
        build_trainer(parse_options(command_line(tiny_model, [], **values)))
    build_trainer(parse_options(command_line(tiny_model, [], per_device_eval_batch_size=2, **values)))


@pytest.mark.parametrize(
    ("values", "is_said"),
    [
        ({"chunk_size": 65}, True),
        ({"chunk_size": 64}, False),
        ({"chunk_size": "auto"}, False),
        ({"chunk_size": 65, "chunk_method": "none"}, False),
        ({"chunk_size": 65, "max_length": "none"}, False),
        ({"chunk_size": 65, "packing": True, "per_device_train_batch_size": 2}, False),
        ({"chunk_size": 129, "packing": True, "per_device_train_batch_size": 2}, True),
        ({"chunk_size": 65, "chunk_packing": True}, False),
    ],
)
def test_chunks_longer_than_any_row_are_said(tiny_model: Path, values: dict[str, Any], is_said: bool) -> None:
    options = parse_options(command_line(tiny_model, TEXTS[:1], **values))
    line = chunk_size_line(options, check_options(options))
    assert (line is not None) == is_said
    if line is not None:
        assert f"chunk_size={values['chunk_size']} is above max_length=64" in line


def test_the_line_is_printed(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build_trainer(parse_options(command_line(tiny_model, TEXTS[:1], chunk_size=65)))
    assert capsys.readouterr().out.count("chunk_size=65 is above max_length=64") == 1
