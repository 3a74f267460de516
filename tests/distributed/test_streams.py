"""Gradients of a packed global batch are those of its sequences one at a time: one rank and four."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, distributed

from chunkdist import ChunkConfig, chunk_model
from chunkdist.data.assignment import BatchPlan, plan_batch
from chunkdist.data.cost import SequenceCost
from chunkdist.data.streams import NO_LABEL, join_sequences, stream_of
from tests.distributed.ranks import Ranks
from tests.helpers.models import VOCAB_SIZE, tiny_llama

LENGTHS = (9, 1, 3, 61, 5, 1, 13, 2, 17, 8, 7, 1, 11, 4, 6, 14)
"""One longer than all others of any rank together, some of a single token."""
CHUNK_SIZE, BUDGET_TOKENS = 7, 18


def samples() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    made = []
    for length in LENGTHS:
        ids = torch.randint(0, VOCAB_SIZE, (length,), generator=generator)
        labels = ids.clone()
        labels[: length // 3] = NO_LABEL  # a prompt
        made.append({"input_ids": ids, "labels": labels})
    return made


def num_supervised() -> int:
    return sum(int((sample["labels"][1:] != NO_LABEL).sum()) for sample in samples())


def plan(num_ranks: int) -> BatchPlan:
    cost = SequenceCost.of(tiny_llama())
    return plan_batch(
        LENGTHS, num_ranks=num_ranks, cost=cost, budget_tokens=BUDGET_TOKENS, chunk_size=CHUNK_SIZE
    )


@cache
def one_at_a_time() -> dict[str, Tensor]:
    """Unchunked, unpacked: the sum of the losses of all tokens, divided by their number."""
    model = tiny_llama()
    for sample in samples():
        ids, labels = sample["input_ids"][None], sample["labels"][None]
        model(ids, labels=labels, num_items_in_batch=num_supervised(), use_cache=False).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def packed_gradients(num_ranks: int, rank: int, settings: dict[str, Any]) -> dict[str, Tensor]:
    """What a rank's streams leave, one micro-batch after another."""
    model = chunk_model(tiny_llama(), ChunkConfig(chunk_size=CHUNK_SIZE, attention="math", **settings))
    made = samples()
    for stream in plan(num_ranks).streams[rank]:
        inputs = join_sequences([made[index] for index in stream])
        loss = model(**inputs, use_cache=False, num_items_in_batch=num_supervised()).loss
        loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def reduced_errors(settings: dict[str, Any]) -> float:
    """Runs on every rank of the group: gradients of all ranks, added up, against the truth."""
    found = packed_gradients(distributed.get_world_size(), distributed.get_rank(), settings)
    for grad in found.values():
        distributed.all_reduce(grad)
    return largest_error(found)


def largest_error(found: dict[str, Tensor]) -> float:
    truth = one_at_a_time()
    assert found.keys() == truth.keys()
    return max(float((found[name] - truth[name]).norm() / truth[name].norm()) for name in truth)


def test_the_plans_have_what_is_claimed() -> None:
    for num_ranks in (1, 4):
        streams = [
            [LENGTHS[index] for index in stream]
            for own in plan(num_ranks).streams
            for stream in own
            if stream
        ]
        assert [61] in streams, "a sequence longer than the budget is alone"
        borders = [
            stream_of(stream, CHUNK_SIZE).is_read_later(0, range(-(-sum(stream) // CHUNK_SIZE)))
            for stream in streams
        ]
        assert sum(borders) >= 3, "segments straddle chunk borders"
        assert any(1 in stream and len(stream) > 1 for stream in streams)
    assert any(not stream for own in plan(4).streams for stream in own), "a rank waits for others"


SETTINGS = [
    pytest.param(
        {"layers_per_group": height, "retained_chunks": retained}, id=f"group{height}-retained{retained}"
    )
    for height in (1, 2, "all")
    for retained in (0, 1)
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_one_rank(settings: dict[str, Any]) -> None:
    assert largest_error(packed_gradients(1, 0, settings)) < 1e-10


@pytest.mark.parametrize("settings", SETTINGS[:4])
def test_four_ranks(four_ranks: Ranks, settings: dict[str, Any]) -> None:
    assert max(four_ranks.run(reduced_errors, settings)) < 1e-10


@pytest.mark.parametrize("broken", ["segments", "first label", "an assignment"])
def test_a_fault_is_seen(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = join_sequences

    def join(made: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        inputs = real(made)
        if broken == "segments":
            inputs["position_ids"] = torch.arange(inputs["input_ids"].shape[1])[None]
        elif broken == "first label":
            inputs["labels"] = inputs["input_ids"].clone()
        else:
            inputs = real(made[1:])
        return inputs

    monkeypatch.setitem(globals(), "join_sequences", join)
    assert largest_error(packed_gradients(1, 0, {})) > 1e-4
