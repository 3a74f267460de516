"""NEFTune's noise in packed rows is that of each sequence alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers.integrations.neftune import neftune_post_forward_hook

from chunkdist import ChunkConfig, chunk_model
from tests.helpers.models import batch, packed_batch, tiny_llama

ALPHA = 5.0
LENGTHS = [4, 30, 12]


def noise_of(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """What is added to the embeddings, seen at the first layer."""
    embeddings = model.model.embed_tokens
    embeddings.neftune_noise_alpha = ALPHA
    handle = embeddings.register_forward_hook(neftune_post_forward_hook)
    seen: list[torch.Tensor] = []
    layer = model.model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    torch.manual_seed(0)
    model(**inputs, use_cache=False).loss.backward()
    assert list(embeddings._forward_hooks.values()) == [neftune_post_forward_hook]
    handle.remove()
    layer.remove()
    return (seen[0] - embeddings.weight[inputs["input_ids"]]).detach()


@pytest.mark.parametrize("told_by", ["position_ids", "cu_seq_lens_q"])
def test_packed_rows(told_by: str) -> None:
    model = chunk_model(tiny_llama(num_layers=2, hidden_size=64), ChunkConfig(chunk_size=8))
    inputs = packed_batch(LENGTHS)
    if told_by == "cu_seq_lens_q":
        inputs["cu_seq_lens_q"] = torch.tensor([0, 4, 34, 46], dtype=torch.int32)
    for noise, length in zip(noise_of(model, inputs)[0].split(LENGTHS), LENGTHS, strict=True):
        largest = ALPHA / math.sqrt(length * 64)
        assert 0.9 * largest < noise.abs().max() <= largest * (1 + 1e-6)


def test_rows_of_one_sequence_are_transformers_own() -> None:
    inputs = batch(num_rows=2, num_tokens=37)
    plain, model = (tiny_llama(num_layers=2) for _ in range(2))
    chunk_model(model, ChunkConfig(chunk_size=8))
    assert torch.equal(noise_of(model, inputs), noise_of(plain, inputs))


def test_no_noise_in_evaluation() -> None:
    model = chunk_model(tiny_llama(num_layers=2), ChunkConfig(chunk_size=8)).eval()
    assert not noise_of(model, packed_batch(LENGTHS)).any()
