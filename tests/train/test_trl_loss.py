"""The launcher's loss is chunkdist's: the same loss, gradients and figures as TRL's fused head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from trl.trainer import utils

from chunkdist.train.build import build_trainer, chunk_trainer
from chunkdist.train.options import parse_options
from tests.helpers.planted_memory import memory_for
from tests.helpers.tiny_run import command_line, make_model_folder

ROWS = [{"input_ids": [(7 * n + 3 * i) % 200 for i in range(length)]} for n, length in enumerate((40, 23))]


def trainer_of(folder: Path, **values: Any) -> Any:
    if not (folder / "model").exists():
        make_model_folder(folder / "model")
    options = {"report_to": "none", "chunk_check": False, "per_device_train_batch_size": 2, **values}
    trainer, config = build_trainer(parse_options(command_line(folder / "model", ROWS, **options)))
    chunk_trainer(trainer, config)
    return trainer


def figures_of(trainer: Any) -> tuple[float, dict[str, list[float]], list[torch.Tensor]]:
    """Loss, what is logged, and gradients, of one micro-batch with padding."""
    trainer.model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    assert (batch["labels"] == -100).any()
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(50))
    loss.backward()
    metrics = {name: list(values) for name, values in trainer._metrics["train"].items()}
    return loss.item(), metrics, [p.grad for p in trainer.model.parameters()]


def test_it_is_what_trl_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = figures_of(trainer_of(tmp_path, chunk_method="none"))

    def refuse(*args: object) -> None:
        raise AssertionError("TRL's head was called")

    monkeypatch.setattr(utils._ChunkedLogProbFunction, "apply", refuse)
    found = figures_of(trainer_of(tmp_path))
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found[1].keys() == expected[1].keys()
    for name, values in expected[1].items():
        assert found[1][name] == pytest.approx(values, rel=1e-5), name
    for mine, theirs in zip(found[2], expected[2], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-6)


def test_another_loss_stays_trls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def called(*args: object) -> None:
        raise KeyError("TRL's head was called")

    monkeypatch.setattr(utils._ChunkedLogProbFunction, "apply", called)
    with pytest.raises(KeyError, match="TRL's head was called"):
        figures_of(trainer_of(tmp_path, loss_type="dft"))


def test_a_loss_that_runs_out_of_memory_runs_again(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, oom="shrink", chunk_size=128)
    with memory_for(0, "loss") as refused:
        trainer.train()
    assert len(refused) == 1
    assert trainer.state.global_step == 2
