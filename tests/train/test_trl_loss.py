"""The launcher's loss is chunkdist's: the same loss, gradients and figures as TRL's fused head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from trl.trainer import utils

from chunkdist.loss import cross_entropy
from chunkdist.train.build import build_trainer, chunk_trainer
from chunkdist.train.options.arguments import parse_options
from tests.helpers.planted_memory import memory_for
from tests.helpers.row_logits import RowLogits
from tests.helpers.tiny_run import command_line, make_model_folder, write_rows

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


@pytest.mark.parametrize("options", [{"loss_type": "dft"}, {"label_smoothing_factor": 0.9}])
def test_other_losses_without_all_logits(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = figures_of(trainer_of(tmp_path, chunk_method="none", **options))
    plain = figures_of(trainer_of(tmp_path, chunk_method="none"))
    assert plain[0] != pytest.approx(expected[0], rel=1e-4)

    def refuse(*args: object) -> None:
        raise AssertionError("TRL's head was called")

    monkeypatch.setattr(utils._ChunkedLogProbFunction, "apply", refuse)
    monkeypatch.setattr(cross_entropy, "TILE_BYTES", 1)
    trainer = trainer_of(tmp_path, **options)
    with RowLogits(trainer.model.config.vocab_size) as logits:
        found = figures_of(trainer)
    assert logits.count == 0
    torch.testing.assert_close(found[:2], expected[:2], rtol=1e-5, atol=0)
    for mine, theirs in zip(found[2], expected[2], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-6)


def test_labels_that_cannot_be_smoothed_any_more_are_refused(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, label_smoothing_factor=0.1)
    trainer.model.lm_head.register_forward_hook(lambda module, inputs, logits: logits * 3)
    with pytest.raises(RuntimeError, match="labels cannot be smoothed any more"):
        figures_of(trainer)


def test_with_torch_compile(tmp_path: Path) -> None:
    """The chunked model is left as it is, and the loss with it."""
    losses = []
    for options in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        trainer = trainer_of(tmp_path, logging_steps=1, **options)
        trainer.train()
        losses.append([record["loss"] for record in trainer.state.log_history if "loss" in record])
    assert len(losses[0]) == 2
    assert losses[1] == losses[0]


def test_a_loss_that_runs_out_of_memory_runs_again(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, oom="shrink", chunk_size=128)
    with memory_for(0, "loss") as refused:
        trainer.train()
    assert len(refused) == 1
    assert trainer.state.global_step == 2


UNEVEN = [{"input_ids": [(5 * n + 3 * i) % 200 for i in range(9 + 11 * (n % 5))]} for n in range(12)]


def run_of(folder: Path, **values: Any) -> dict[str, Any]:
    """Three steps of two micro-batches each: what is logged, weights, and `outputs.loss` of each forward."""
    if not (folder / "model").exists():
        make_model_folder(folder / "model")
    given = {"report_to": "none", "chunk_check": False, "per_device_train_batch_size": 2, **values}
    given |= {"gradient_accumulation_steps": 2, "max_steps": 3, "optim": "sgd"}
    (folder / "both").mkdir(exist_ok=True)
    for split, rows in (("train", UNEVEN), ("test", UNEVEN[1:6])):
        write_rows(folder / "both" / f"{split}.jsonl", rows)
    given |= {"dataset_name": folder / "both", "eval_strategy": "steps", "eval_steps": 1}
    trainer, config = build_trainer(parse_options(command_line(folder / "model", [], **given)))
    chunk_trainer(trainer, config)
    seen: list[float] = []
    trainer.model.register_forward_hook(lambda model, inputs, outputs: seen.append(outputs.loss.item()))
    trainer.train()
    names = ("loss", "grad_norm", "eval_loss", "entropy", "mean_token_accuracy", "eval_entropy")
    logged = [[row[name] for name in names if name in row] for row in trainer.state.log_history[:-1]]
    return {"outputs": seen, "logged": logged, "weights": [p.detach() for p in trainer.model.parameters()]}


def test_a_run_is_trls_step_for_step(tmp_path: Path) -> None:
    expected, found = run_of(tmp_path, chunk_method="none"), run_of(tmp_path)
    assert len(expected["outputs"]) > 6
    torch.testing.assert_close(found["outputs"], expected["outputs"], rtol=1e-5, atol=0)
    torch.testing.assert_close(found["logged"], expected["logged"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["weights"], expected["weights"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("given", [{}, {"num_items_in_batch": torch.tensor(50)}, {"num_items_in_batch": 7}])
def test_outputs_loss_is_trls(tmp_path: Path, given: dict[str, Any]) -> None:
    results = []
    for method in ("none", "seco"):
        trainer = trainer_of(tmp_path, chunk_method=method)
        trainer.model.train()
        batch = next(iter(trainer.get_train_dataloader()))
        outputs = trainer.model(**batch, **given, use_cache=False, fused_lm_head=True)
        outputs.loss.backward()
        norm = torch.stack([p.grad.norm() for p in trainer.model.parameters()])
        results.append((outputs.loss.item(), norm, outputs.label_mask))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-7)


def test_a_hook_on_the_output_layer_is_passed_over_as_trl_does(tmp_path: Path) -> None:
    """TRL's head never calls the output layer."""
    results = []
    for method in ("none", "seco"):
        trainer = trainer_of(tmp_path, chunk_method=method)
        trainer.model.lm_head.register_forward_hook(lambda module, inputs, logits: logits * 3)
        results.append(figures_of(trainer)[:2])
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-5)
    assert results[1][1]["entropy"] == pytest.approx(results[0][1]["entropy"], rel=1e-5)
