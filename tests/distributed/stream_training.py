"""One run of the launcher's trainer on token streams, on every rank of a group."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import distributed

from chunkdist.train.build import build_trainer, chunk_trainer
from chunkdist.train.options.arguments import parse_options
from tests.helpers.tiny_run import command_line

LENGTHS = (23, 45, 3, 60, 7, 31, 2, 18)


def rows() -> list[dict[str, Any]]:
    return [{"input_ids": [(7 * n + 3 * i) % 200 for i in range(length)]} for n, length in enumerate(LENGTHS)]


def weights_before_and_after(model: Path, values: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Trains two steps on global batches of all sequences."""
    num_ranks = distributed.get_world_size() if distributed.is_initialized() else 1
    rank = distributed.get_rank() if distributed.is_initialized() else 0
    folder = model.parent / f"rank{rank}-of-{num_ranks}"
    folder.mkdir()
    (folder / "model").symlink_to(model)
    arguments = command_line(
        folder / "model",
        rows(),
        chunk_packing=True,
        per_device_train_batch_size=len(LENGTHS) // num_ranks,
        optim="sgd",
        learning_rate=0.1,
        report_to="none",
        chunk_check=False,
        **values,
    )
    trainer, config = build_trainer(parse_options(arguments))
    chunk_trainer(trainer, config)
    assert trainer.accelerator.num_processes == num_ranks
    before = _weights(trainer)
    trainer.train()
    return before, _weights(trainer)


def _weights(trainer: Any) -> list[float]:
    weights: list[float] = torch.cat([p.detach().flatten() for p in trainer.model.parameters()]).tolist()
    return weights
