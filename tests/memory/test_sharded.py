"""What engines, optimizers and quantised weights take, by the numbers of a small model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from chunkdist import ChunkConfig
from chunkdist.memory.estimate import estimate_memory
from chunkdist.memory.model_sizes import ModelSizes, quantized
from chunkdist.memory.optimizers import OptimizerMemory
from chunkdist.memory.sharded import Engine, HostTraffic
from chunkdist.memory.simulate import simulate
from tests.helpers.models import tiny_llama, with_lora

CONFIG = ChunkConfig(chunk_size=64, keep_attention=False)


@pytest.fixture(scope="module")
def sizes() -> ModelSizes:
    return ModelSizes.for_config(tiny_llama(dtype=torch.float32), CONFIG)


@pytest.mark.parametrize(
    ("engine", "weights", "optimizer"),
    [
        (Engine(), 4, 8),
        (Engine(name="ddp", num_ranks=4), 4, 8),
        (Engine(name="fsdp2", num_ranks=4), 1, 2),
        (Engine(name="zero1", num_ranks=4), 4, 3),
        (Engine(name="zero2", num_ranks=4), 4, 3),
        (Engine(name="zero3", num_ranks=4), 1, 3),
    ],
)
def test_bytes_a_parameter_between_steps(
    sizes: ModelSizes, engine: Engine, weights: int, optimizer: int
) -> None:
    """docs/sharding.md: fp32 with AdamW; ZeRO has fp32 masters beside the weights."""
    estimate = estimate_memory(sizes, CONFIG, num_tokens=256, engine=engine, optimizer="adamw_torch_fused")
    count = sizes.all_weights.num_numbers
    assert estimate.device["weights"] == pytest.approx(weights * count, abs=8)
    assert estimate.device["optimizer"] == pytest.approx(optimizer * count, abs=8)


ON_HOST = {"offloads_weights": True, "offloads_optimizer": True}
IN_BF16 = {"master_bytes": 2, "state_bytes": 2, "gathered_element_bytes": 2}


@pytest.mark.parametrize(
    ("engine", "num_bytes"),
    [
        (Engine(name="fsdp2", num_ranks=4, **ON_HOST), (4 + 4 + 8) / 4),
        (Engine(name="fsdp2", **ON_HOST), 4 + 4 + 8),
        (
            Engine(name="zero3", num_ranks=2, **ON_HOST),
            (4 + 4 + 4 + 8 + 4) / 2,
        ),  # masters and their gradients
        (Engine(name="zero3", gathered_element_bytes=2, **ON_HOST), 2 + 2 + 4 + 8 + 4),
        (Engine(name="zero3", **IN_BF16, **ON_HOST), 2 + 2 + 2 + 4 + 2),
        (Engine(name="zero2", offloads_optimizer=True), 4 + 8 + 4),
    ],
)
def test_bytes_a_parameter_on_the_host(sizes: ModelSizes, engine: Engine, num_bytes: float) -> None:
    estimate = estimate_memory(sizes, CONFIG, num_tokens=256, engine=engine, optimizer="adamw_torch_fused")
    count = sizes.all_weights.num_numbers
    assert "optimizer" not in estimate.device
    assert estimate.device["weights"] == (0 if engine.offloads_weights else 4 * count)
    assert estimate.host_bytes == pytest.approx(num_bytes * count, abs=8)
    assert estimate.waiting_bytes == 0


def test_bytes_over_the_bus(sizes: ModelSizes) -> None:
    """As counted in tests/distributed/test_offload.py. With ZeRO's optimizer on the host, gradients go
    out as they are summed, in for their norm, and out as it reads them."""
    count, states = sizes.all_weights.num_numbers, OptimizerMemory.named("adamw_torch_fused")
    alone = Engine(name="fsdp2", **ON_HOST).traffic(sizes, states)
    shared = Engine(name="fsdp2", num_ranks=4, **ON_HOST).traffic(sizes, states)
    assert (alone.into, alone.out) == (8 * count - sizes.head.whole_bytes, 4 * count)
    assert (4 * shared.into, 4 * shared.out, 4 * shared.memory) == pytest.approx(
        (alone.into, alone.out, alone.memory), abs=16
    )
    zero3 = Engine(name="zero3", **ON_HOST).traffic(sizes, states)
    assert (zero3.into, zero3.out) == (12 * count, 8 * count)
    zero2 = Engine(name="zero2", offloads_optimizer=True).traffic(sizes, states)
    assert (zero2.into, zero2.out) == (8 * count, 8 * count)
    assert Engine(name="zero3", num_ranks=2).traffic(sizes, states) == HostTraffic()


def test_optimizers() -> None:
    def of(name: str) -> int:
        memory = OptimizerMemory.named(name)
        assert memory is not None
        return memory.state_bytes(1000, 2000, 30)

    assert of("adamw_torch") == 4000
    assert of("sgd") == 0
    assert of("paged_adamw_32bit") == 8000
    assert of("adamw_8bit") == of("adamw_bnb_8bit") == of("paged_adamw_8bit") == 2031  # a scale for 256
    assert of("adafactor") == 120
    assert OptimizerMemory.named("lomo") is None


def test_an_optimizer_that_is_not_known_is_said_to_be_left_out(sizes: ModelSizes) -> None:
    assert not estimate_memory(sizes, CONFIG, num_tokens=256, optimizer="lomo").is_complete
    assert estimate_memory(sizes, CONFIG, num_tokens=256, optimizer="sgd").is_complete


def test_quantised_weights(sizes: ModelSizes) -> None:
    """Everything is trained here: nothing is packed. Frozen, a number of a layer takes 4.5 bits."""
    assert quantized(sizes, num_bits=4).all_weights.whole_bytes == sizes.all_weights.whole_bytes
    model = tiny_llama(dtype=torch.bfloat16)
    model.requires_grad_(False)
    frozen = ModelSizes.for_config(model, CONFIG)
    packed = quantized(frozen, num_bits=4)
    in_layers = sum(w.num_numbers for w in frozen.layers)
    saved = frozen.all_weights.whole_bytes - packed.all_weights.whole_bytes
    assert saved == pytest.approx(in_layers * (2 - 0.5 - 4 / 64), abs=8)


def test_gradients_of_several_micro_batches(sizes: ModelSizes) -> None:
    one, several = (
        estimate_memory(sizes, CONFIG, num_tokens=4096, num_micro_batches=number).moments["the loss"]
        for number in (1, 2)
    )
    assert several - one == sizes.all_weights.whole_trainable_bytes


@pytest.mark.parametrize(
    "engine", [Engine(name="fsdp2", num_ranks=4), Engine(name="fsdp2", **ON_HOST)], ids=["4", "1, offloaded"]
)
@pytest.mark.parametrize(
    ("settings", "lora", "height"),
    [({}, False, 2), ({"tie_word_embeddings": True}, False, 1), ({"vocab_size": 8000}, True, 1)],
)
def test_a_rank_of_fsdp2_against_the_real_code(
    engine: Engine, settings: dict[str, Any], lora: bool, height: int
) -> None:
    """Each with another moment: a group's gradients, tied weights, gathers of a large vocabulary."""
    config = ChunkConfig(chunk_size=64, layers_per_group=height, keep_attention=lora)
    with torch.device("meta"):
        model = tiny_llama(num_layers=4, dtype=torch.bfloat16, hidden_size=128, **settings)
        model = with_lora(model) if lora else model
    sizes = ModelSizes.for_config(model, config, device_type="cuda")
    simulated = simulate(model, sizes, config, num_tokens=256, engine=engine)
    estimate = estimate_memory(sizes, config, num_tokens=256, engine=engine)
    assert estimate.step_bytes == pytest.approx(simulated.peak_bytes, rel=0.05)


def test_deepspeed_is_not_simulated(sizes: ModelSizes) -> None:
    with pytest.raises(ValueError, match="zero3 does not run under fake tensors"):
        simulate(tiny_llama(), sizes, CONFIG, num_tokens=64, engine=Engine(name="zero3", num_ranks=4))
