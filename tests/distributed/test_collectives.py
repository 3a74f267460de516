"""Chunks cost no collective: as many as without chunks, whatever their number, on every rank."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.distributed.cases import CHUNK_SIZE, Case
from tests.distributed.collectives import counts_of
from tests.distributed.ranks import Ranks

CASES: dict[str, dict[str, Any]] = {
    "fsdp2": {"engine": "fsdp2"},
    "fsdp2, groups of 2": {"engine": "fsdp2", "layers_per_group": 2},
    "fsdp2, retained chunks": {"engine": "fsdp2", "retained_chunks": 3},
    "fsdp2, a unit a group": {"engine": "fsdp2 groups", "layers_per_group": 2},
    "fsdp2, LoRA": {"engine": "fsdp2", "lora": True},
    "fsdp2, head and embeddings apart": {"engine": "fsdp2 head"},
    "zero3": {"engine": "zero3"},
    "zero3, LoRA": {"engine": "zero3", "lora": True},
    "zero3, retained chunks": {"engine": "zero3", "retained_chunks": 3},
}


@pytest.mark.parametrize("name", CASES)
def test_as_many_as_without_chunks(two_ranks: Ranks, name: str) -> None:
    case = Case(lengths=(CHUNK_SIZE, 50 * CHUNK_SIZE), **CASES[name])
    plain = two_ranks.run(counts_of, replace(case, chunked=False))
    chunked = two_ranks.run(counts_of, case)
    print(name, chunked)
    assert len(chunked[0][0]) == 2, "one kind of all-gather, and one kind of reduction, must have been seen"
    assert all(step == chunked[0][0] for of_rank in (*plain, *chunked) for step in of_rank), (plain, chunked)
