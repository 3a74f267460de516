"""Weights, gradients and optimizer states on the host between uses, on one rank and on two: gradients are
those of the plain model, resumed runs go on as whole ones, and what they save loads in one process."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.cases import CHUNK_SIZE, Case
from tests.distributed.memory import bytes_over_the_bus, formula_and_count_of_zero3
from tests.distributed.ranks import Ranks
from tests.distributed.test_gradients import check
from tests.distributed.test_resume import LORA, folder, loaded, model, run

__all__ = ["folder", "model"]  # fixtures

LENGTHS = (5 * CHUNK_SIZE + 2, CHUNK_SIZE - 1)
CASES: dict[str, dict[str, Any]] = {
    "FSDP2, a unit a layer": {"engine": "fsdp2"},
    "FSDP2, groups of 2, head and embeddings apart": {"engine": "fsdp2 head", "layers_per_group": 2},
    "FSDP2, one group, inputs on the host": {
        "engine": "fsdp2 head", "layers_per_group": "all", "offload": "host", "num_micro_batches": 2,
    },
    "FSDP2, LoRA, tied": {"engine": "fsdp2 head", "lora": True, "tied": True, "max_grad_norm": 0.05},
    "ZeRO-3": {"engine": "zero3", "max_grad_norm": 0.05},
    "ZeRO-3, LoRA": {"engine": "zero3", "lora": True},
    "ZeRO-3, accumulation, inputs on the host": {
        "engine": "zero3", "num_micro_batches": 3, "offload": "host", "retained_chunks": 2,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def one_rank() -> Iterator[Ranks]:
    ranks = Ranks(1)
    yield ranks
    ranks.stop()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_gradients_are_those_of_the_plain_model(
    one_rank: Ranks, two_ranks: Ranks, num_ranks: int, name: str
) -> None:
    ranks = one_rank if num_ranks == 1 else two_ranks
    check(ranks, Case(weights_on_host=True, lengths=LENGTHS[:num_ranks], **CASES[name]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
@pytest.mark.parametrize("training", ["full", "LoRA"])
@pytest.mark.parametrize("engine", ["fsdp2-offload", "zero3-offload"])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_resumed_run_goes_on_as_the_whole_one(
    one_rank: Ranks, two_ranks: Ranks, folder: Path, num_ranks: int, engine: str, training: str
) -> None:
    ranks, lora = one_rank if num_ranks == 1 else two_ranks, training == "LoRA"
    options = LORA if lora else {}
    whole = run(ranks, engine, folder, **options)
    assert list(whole) == [1, 2, 3, 4]
    weights = loaded(folder, lora=lora)
    shutil.rmtree(folder / "out" / "checkpoint-4")
    assert run(ranks, engine, folder, resume_from_checkpoint=True, **options) == whole
    for name, value in loaded(folder, lora=lora).items():
        assert torch.equal(value, weights[name]), name


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_the_estimate_of_zero3_is_what_is_counted(
    one_rank: Ranks, two_ranks: Ranks, num_ranks: int, lora: bool
) -> None:
    """On the device and on the host. Of FSDP2: tests/memory/test_sharded.py."""
    ranks = one_rank if num_ranks == 1 else two_ranks
    for found in ranks.run(formula_and_count_of_zero3, lora, True, True):
        for formula, counted in found:
            assert formula == pytest.approx(counted, rel=0.05)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_the_bytes_that_are_copied_in(one_rank: Ranks, engine: str, lora: bool) -> None:
    ((counted, formula),) = one_rank.run(bytes_over_the_bus, engine, lora)
    assert formula == pytest.approx(counted, rel=0.02)
