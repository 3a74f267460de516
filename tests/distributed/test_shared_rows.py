"""Trainers whose ranks share rows train as one process does."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.ranks import Ranks
from tests.distributed.shared_rows import launched, launched_errors, ulysses_trainer
from tests.helpers.tiny_run import ROOT

BATCH = 2
CASES: dict[str, dict[str, Any]] = {
    "DDP": {},
    "chunk_packing": {"chunk_packing": True},
    "accumulation": {"gradient_accumulation_steps": 2, "max_steps": 2},
    "SpaCO": {"chunk_method": "spaco", "spaco_budget": 100},
    "FSDP2": {"fsdp": "full_shard"},
    **{f"ZeRO-{stage}": {"deepspeed": ROOT / f"configs/deepspeed/zero{stage}.json"} for stage in (1, 2, 3)},
}
WITH_REPLICAS = {name: CASES[name] for name in ("DDP", "chunk_packing", "FSDP2")}


def check(ranks: Ranks, cases: dict[str, dict[str, Any]]) -> None:
    replicas = ranks.num_ranks // 2
    engines = ("fsdp", "deepspeed")
    expected = {
        name: launched(
            {**{k: x for k, x in values.items() if k not in engines}, "per_device_train_batch_size": BATCH}
        )
        for name, values in cases.items()
    }
    shared = {"sequence_parallel_size": 2, "per_device_train_batch_size": BATCH // replicas}
    cases = {name: {**values, **shared} for name, values in cases.items()}
    for errors in ranks.run(launched_errors, cases, expected):
        assert not {name: error for name, error in errors.items() if not error < 1e-5}
        assert errors.keys() == cases.keys()


def test_the_launchers_trainer(two_ranks: Ranks) -> None:
    check(two_ranks, CASES)


def test_with_replicas(four_ranks: Ranks) -> None:
    check(four_ranks, WITH_REPLICAS)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeeds_own_groups(two_ranks: Ranks, stage: int) -> None:
    for of_losses, of_updates in two_ranks.run(ulysses_trainer, stage):
        assert max(of_losses, of_updates) < 1e-5
