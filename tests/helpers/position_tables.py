"""Data of known lengths, and what the loss by position of a run on them adds up to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from chunkdist import extend_context
from tests.helpers.tiny_run import write_rows

LENGTHS = (40, 150, 9, 70, 300, 25, 130, 81)
OPTIONS: dict[str, Any] = {
    "max_length": 320,
    "chunk_check": False,
    "report_to": "none",
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 3,
    "gradient_accumulation_steps": 2,
    "max_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "eval_on_start": True,
}


def _rows(lengths: tuple[int, ...]) -> list[dict[str, Any]]:
    """The first quarter of each is a prompt."""
    made = []
    for number, length in enumerate(lengths):
        ids = [(7 * number + 3 * i * i) % 200 for i in range(length)]
        made.append({"input_ids": ids, "labels": [-100] * (length // 4) + ids[length // 4 :]})
    return made


def data_in(folder: Path, num_eval: int = 6) -> Path:
    """Samples to train on, and some of 90 tokens to evaluate."""
    folder.mkdir()
    write_rows(folder / "train.jsonl", _rows(LENGTHS))
    write_rows(folder / "test.jsonl", _rows((90,) * num_eval))
    return folder


def records_in(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def check_sums(record: dict[str, Any], loss: float | None = None) -> tuple[list[list[int]], int]:
    """A line's table adds up to its loss, or to `loss`, and to the mean that is logged. The ranges of
    positions, and how many tokens there are."""
    prefix = "" if "loss" in record else "eval_"  # a run that goes on joins the lines of a step
    table = record[f"{prefix}loss_by_position"]
    num_tokens = sum(count for *_, count in table)
    mean = sum(loss * count for _, _, loss, count in table) / num_tokens
    assert mean == pytest.approx(record[f"{prefix}loss"] if loss is None else loss, rel=1e-6)
    assert record[f"{prefix}loss_by_position/0-1K"] == pytest.approx(mean, rel=1e-6)
    return [row[:2] for row in table], num_tokens


def check_run(out: Path, num_eval: int = 6, first_eval_loss: float | None = None) -> None:
    """Of two steps with `OPTIONS`, each of half the samples, and two evaluations.

    Args:
        first_eval_loss: Mean over the tokens that are evaluated before the first step, where transformers'
            mean over batches is another.
    """
    records = records_in(out)
    first, last = (record for record in records if "eval_loss" in record)
    trained = [check_sums(record) for record in records if "loss" in record]
    evaluated = ([[0, 64], [64, 128]], 68 * num_eval)
    assert check_sums(first, first_eval_loss) == evaluated
    if first_eval_loss is None:
        assert check_sums(last) == evaluated
    assert len(trained) == 2
    assert sum(num_tokens for _, num_tokens in trained) == sum(n - max(1, n // 4) for n in LENGTHS)
    assert max(end for ranges, _ in trained for _, end in ranges) == 512


def eval_loss(model: Path, num_eval: int, *, context_length: int | None = None) -> float:
    """The mean over the tokens of `data_in`'s samples to evaluate, each row alone."""
    plain = AutoModelForCausalLM.from_pretrained(model)
    if context_length is not None:
        extend_context(plain, context_length)
    losses = []
    for row in _rows((90,) * num_eval):
        ids, labels = (torch.tensor(row[name]) for name in ("input_ids", "labels"))
        with torch.no_grad():
            logits = plain(ids[None]).logits[0]
        losses.append(F.cross_entropy(logits[:-1], labels[1:]).item())
    return sum(losses) / num_eval
