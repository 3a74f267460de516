"""A tokenizer that cannot end a sample of plain text is named before it is asked to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from chunkdist.train.build import build_trainer
from chunkdist.train.options.arguments import parse_options
from chunkdist.train.options.tokenizer_options import check_end_token
from tests.helpers.tiny_run import TEXTS, USER, command_line


def without_end(model: Path) -> Path:
    file = model / "tokenizer_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in config.items() if key != "eos_token"}))
    return model


def test_plain_text_needs_a_token_that_ends_it(tiny_model: Path) -> None:
    with pytest.raises(ValueError, match="has no eos_token to end a sample with: write eos_token"):
        build_trainer(parse_options(command_line(without_end(tiny_model), TEXTS[:1])))


@pytest.mark.parametrize(
    "row", [{"input_ids": [1, 2]}, {"messages": [USER]}, {"prompt": [USER], "completion": [USER]}]
)
def test_other_samples_do_not(tiny_model: Path, row: dict[str, Any]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(without_end(tiny_model))
    assert tokenizer.eos_token is None
    training = parse_options(command_line(tiny_model, [row])).training
    check_end_token(Dataset.from_list([row]), tokenizer, training, name="m")


def test_a_token_that_is_none(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(without_end(tiny_model))
    data = Dataset.from_list(TEXTS[:1])
    training = parse_options(command_line(tiny_model, TEXTS[:1], eos_token="<nothing>")).training
    with pytest.raises(ValueError, match="eos_token='<nothing>' is no token of the tokenizer of 'm'"):
        check_end_token(data, tokenizer, training, name="m")
    training.eos_token = next(iter(tokenizer.get_vocab()))
    check_end_token(data, tokenizer, training, name="m")
