"""What is said when memory is not enough: where it went, and a schedule that fits, which then does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from chunkdist.memory.machine import VARIABLES
from chunkdist.train.out_of_memory import explained_out_of_memory
from tests.train.reports.test_callback import trainer_of


def failing(*args: Any, **kwargs: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has ...")


@pytest.fixture
def trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    found = trainer_of(tmp_path, max_steps=1)
    found.args.max_length = 4096
    monkeypatch.setattr(found, "training_step", failing)
    return found


def said_by(trainer: Any) -> str:
    with (
        pytest.raises(torch.OutOfMemoryError) as caught,
        explained_out_of_memory(trainer, is_chunked=True),
    ):
        trainer.train()
    return str(caught.value)


def test_names_the_largest_parts_and_what_would_fit(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chunkdist.train.out_of_memory.free_bytes", lambda device: 2**30)
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    said = said_by(trainer)
    assert said.startswith("CUDA out of memory; by the estimate, 4,096 tokens need ")
    assert "loss tile" in said or "one cell" in said
    assert "are enough with chunk_size: " in said
    assert "expandable_segments:True" in said


def test_where_nothing_would_fit(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chunkdist.train.out_of_memory.free_bytes", lambda device: 1)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    said = said_by(trainer)
    assert "4,096 tokens need" in said
    assert "write a smaller max_length" in said
    assert "leaves fewer gaps" not in said


def test_a_plain_model_has_its_own_message(trainer: Any) -> None:
    with (
        pytest.raises(torch.OutOfMemoryError, match=r"^CUDA out of memory. Tried"),
        explained_out_of_memory(trainer, is_chunked=False),
    ):
        failing()
