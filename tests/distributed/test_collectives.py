"""Chunks cost no collective: as many, of as many bytes, as without chunks, whatever their number, on every
rank."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.distributed.cases import CHUNK_SIZE, Case
from tests.distributed.collectives import counts_by_hand, counts_of
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
    case = Case(lengths=(CHUNK_SIZE, 20 * CHUNK_SIZE), **CASES[name])
    plain = two_ranks.run(counts_of, replace(case, chunked=False))
    chunked = two_ranks.run(counts_of, case)
    print(name, chunked)
    assert {"all-gather", "reduce-scatter"} <= chunked[0].keys(), "both must have been seen"
    assert all(found == chunked[0] for found in (*plain, *chunked)), (plain, chunked)


def test_groups_under_zero3_gather_as_many_bytes(two_ranks: Ranks) -> None:
    """In no more gathers; the reductions are the same."""
    lengths = (CHUNK_SIZE, 20 * CHUNK_SIZE)
    case = Case(engine="zero3", layers_per_group=2, reuse_distance=1, lengths=lengths)
    plain = two_ranks.run(counts_of, replace(case, chunked=False))[0]
    for found in two_ranks.run(counts_of, case):
        assert found["reduce-scatter"] == plain["reduce-scatter"]
        assert found["all-gather"].whole_bytes == plain["all-gather"].whole_bytes
        assert found["all-gather"].count <= plain["all-gather"].count


def test_collectives_are_counted_with_their_bytes(two_ranks: Ranks) -> None:
    """8 floats gathered, 4 reduced and scattered, 3 reduced, 2 broadcast; in a backward, too."""
    expected = {"all-gather": (2, 64, 32), "reduce-scatter": (1, 16, 8), "all-reduce": (1, 12, 12)}
    assert two_ranks.run(counts_by_hand) == [{**expected, "broadcast": (1, 8, 8)}] * 2
