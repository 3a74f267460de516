"""Packed rows give what their sequences give one at a time, or are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from chunkdist import ChunkConfig, UnsupportedModelError, chunk_model
from tests.helpers.model_zoo import tiny_model
from tests.helpers.models import gradients, packed_batch, tiny_llama

ROPES: dict[str, dict[str, Any]] = {
    "longrope": {
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 16,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [4.0, 5.0, 6.0, 7.0],
    },
    "dynamic": {"rope_theta": 10000.0, "factor": 4.0},
}


def with_rope(kind: str) -> PreTrainedModel:
    rope = {"rope_type": kind, **ROPES[kind]}
    return tiny_llama(dtype=torch.float64, rope_parameters=rope, max_position_embeddings=16)


def packed_error(kind: str, lengths: list[int]) -> float:
    """Of the gradients of one row, against those of its sequences one at a time."""
    inputs = packed_batch(lengths)
    alone = with_rope(kind)
    for ids, labels in zip(
        inputs["input_ids"].split(lengths, dim=1), inputs["labels"].split(lengths, dim=1), strict=True
    ):
        supervised = (labels[:, 1:] != -100).sum()
        (alone(input_ids=ids, labels=labels).loss * supervised).backward()
    found = gradients(chunk_model(with_rope(kind), ChunkConfig(chunk_size=6, attention="math")), inputs)

    def flat(grads: Any) -> Tensor:
        joined = torch.cat([x.flatten() for x in grads])
        return joined / joined.norm()

    expected = flat(p.grad for p in alone.parameters())
    return float((flat(found[name] for name, _ in alone.named_parameters()) - expected).norm())


@pytest.mark.parametrize("kind", ROPES)
def test_frequencies_that_depend_on_the_longest_sequence(kind: str) -> None:
    assert packed_error(kind, [16, 5, 9]) < 1e-6
    with pytest.raises(
        UnsupportedModelError, match=f"rope_type={kind}.* more than 16 tokens, and one here has 17"
    ):
        packed_error(kind, [17, 5, 9])


def test_one_sequence_may_be_longer() -> None:
    chunk_model(with_rope("longrope"), ChunkConfig(chunk_size=6))(**packed_batch([30]))


def test_a_model_that_numbers_positions_itself() -> None:
    model = chunk_model(tiny_model("BartForCausalLM").float(), ChunkConfig(chunk_size=6))
    with pytest.raises(UnsupportedModelError, match="takes no position_ids"):
        model(**packed_batch([9, 5]))
