"""What the predicted time counts, by arithmetic."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from chunkdist import ChunkConfig
from chunkdist.memory.cards import CARDS, Card
from chunkdist.memory.model_sizes import ModelSizes
from chunkdist.memory.step_time import step_time
from chunkdist.models.flops import StepFlops
from tests.helpers.models import tiny_llama, with_lora

SLOW = {"bandwidth": 1.0, "flops": 1e30}
"""Only bytes count."""


def seconds(model: Any, card: Card, num_tokens: int, chunk_size: int) -> float:
    config = ChunkConfig(chunk_size=chunk_size, rebuild_kv=False)
    sizes = ModelSizes.for_config(model, config, device_type="cuda")
    return step_time(sizes, StepFlops.of(model), config, card, num_tokens=num_tokens).compute_s


def wide(**settings: Any) -> Any:
    """32 heads, as Llama-3-8B has."""
    with torch.device("meta"):
        return tiny_llama(
            num_layers=2,
            dtype=torch.bfloat16,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=8,
            **settings,
        )


def test_a_half_empty_last_wave_takes_as_long_as_a_full_one() -> None:
    """256 blocks of a chunk of 1,024 tokens on an A100 that runs 216 at once: 59 % busy; one of 108 would be
    97 %."""
    only_attention = {"flops": 1.0, "bandwidth": 1e30}
    a100 = replace(CARDS["a100"], **only_attention)
    none_idle = replace(a100, num_multiprocessors=1)
    busy = [seconds(wide(), card, 2**20, 1024) for card in (none_idle, a100)]
    more = [seconds(wide(), card, 2**20, 27 * 256) for card in (none_idle, a100)]
    forwards = 2 / 4.5  # forward and rerun, of them and a backward of 2.5
    assert busy[1] / busy[0] == pytest.approx(1 + forwards * (432 / 256 - 1), rel=0.01)
    assert more[1] / more[0] == pytest.approx(1, rel=0.01)


@pytest.mark.parametrize(("dtype", "num_bytes"), [(torch.bfloat16, 12), (torch.float32, 20)])
def test_gradients_of_weights_are_added_once_a_chunk(dtype: torch.dtype, num_bytes: int) -> None:
    card = replace(CARDS["h100"], **SLOW)
    trained, frozen = wide().to(dtype), wide().to(dtype)
    for parameter in frozen.parameters():
        parameter.requires_grad_(False)
    frozen.model.layers[0].input_layernorm.weight.requires_grad_(True)
    per_chunk = [
        (seconds(model, card, 8192, 1024) - seconds(model, card, 8192, 2048)) / 4
        for model in (trained, frozen)
    ]
    numbers = sum(p.numel() for layer in trained.model.layers for p in layer.parameters())
    again = numbers * dtype.itemsize  # trained weights are read once more
    assert (per_chunk[0] - per_chunk[1]) * 0.8 == pytest.approx(num_bytes * numbers + again, rel=0.02)


def test_adapters_take_more_launches() -> None:
    """Where the host is slower than the card."""
    card = replace(CARDS["h100"], flops=1e30, bandwidth=1e30)
    full, lora = seconds(wide(), card, 4096, 512), seconds(with_lora(wide()), card, 4096, 512)
    assert full == pytest.approx(5e-6 * 2 * 8 * (2 * 42 + 95))
    assert lora == pytest.approx(5e-6 * 2 * 8 * (2 * 69 + 130))


def test_cards_have_what_cuda_reports() -> None:
    assert all(CARDS[name].memory_bytes < 23.7 * 2**30 for name in ("rtx3090", "rtx4090"))
