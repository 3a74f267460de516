"""Gradients of a chunked model are those of the model: all parameters, fp64, every schedule."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from chunkdist import ChunkConfig, chunk_model
from tests.helpers.models import (
    batch,
    gradients,
    largest_difference,
    left_padded,
    packed_batch,
    padded_batch,
    tiny_llama,
    with_lora,
    with_positions,
)

NUM_TOKENS = 37
SCHEDULES = [
    pytest.param(
        {"chunk_size": size, "layers_per_group": height, "retained_chunks": retained},
        id=f"chunk{size}-group{height}-retained{retained}",
    )
    for size in (1, 7, 16, NUM_TOKENS, 1000)
    for height in (1, 2, "all")
    for retained in (0, 1, 1000)
]
INPUTS: dict[str, Callable[[], dict[str, Tensor]]] = {
    "one row": lambda: batch(num_tokens=NUM_TOKENS),
    "packed": lambda: packed_batch([5, 1, 17, 13, 1]),
    "right-padded rows": lambda: padded_batch([NUM_TOKENS, 20, 3]),
    "left-padded rows": lambda: with_positions(left_padded([20, NUM_TOKENS, 3])),
}


def frozen_embeddings(model: Any) -> nn.Module:
    model.get_input_embeddings().weight.requires_grad_(False)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "full": tiny_llama,
    "frozen embeddings": lambda: frozen_embeddings(tiny_llama()),
    "tied embeddings": lambda: tiny_llama(tie_word_embeddings=True),
    "LoRA": lambda: with_lora(tiny_llama()),
    "LoRA on k alone": lambda: with_lora(tiny_llama(), target_modules=["k_proj"]),
    "LoRA, trained embeddings": lambda: with_lora(tiny_llama(), modules_to_save=["embed_tokens", "lm_head"]),
}


@lru_cache
def expected(model: str, inputs: str) -> dict[str, Tensor]:
    return gradients(MODELS[model](), INPUTS[inputs]())


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_full_training(schedule: dict[str, Any], inputs: str) -> None:
    model = chunk_model(MODELS["full"](), ChunkConfig(attention="math", **schedule))
    assert largest_difference(gradients(model, INPUTS[inputs]()), expected("full", inputs)) < 1e-10


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("name", [name for name in MODELS if name != "full"])
@pytest.mark.parametrize("schedule", [s for s in SCHEDULES if s.values[0]["chunk_size"] == 7])
def test_what_is_trained(schedule: dict[str, Any], name: str, inputs: str) -> None:
    model = chunk_model(MODELS[name](), ChunkConfig(attention="math", **schedule))
    assert largest_difference(gradients(model, INPUTS[inputs]()), expected(name, inputs)) < 1e-10


@pytest.mark.parametrize("rebuild_kv", [True, False])
@pytest.mark.parametrize("height", [1, 2])
@pytest.mark.parametrize("attention", ["math", "cpu_flash", "auto"])
def test_rebuilding_and_keeping_kv(attention: Any, height: int, rebuild_kv: bool) -> None:
    config = ChunkConfig(chunk_size=7, layers_per_group=height, rebuild_kv=rebuild_kv, attention=attention)
    for inputs in INPUTS:
        assert (
            largest_difference(
                gradients(chunk_model(tiny_llama(), config), INPUTS[inputs]()), expected("full", inputs)
            )
            < 1e-10
        )


def test_segments_from_cumulative_lengths() -> None:
    inputs = INPUTS["packed"]()
    bounds = torch.tensor([0, 5, 6, 23, 36, 37], dtype=torch.int32)
    inputs.update(cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, max_length_q=17, max_length_k=17)
    model = chunk_model(tiny_llama(), ChunkConfig(chunk_size=7))
    assert largest_difference(gradients(model, inputs), expected("full", "packed")) < 1e-10


def test_packed_rows_of_a_batch() -> None:
    rows = [packed_batch([5, 1, 17, 13, 1]), packed_batch([30, 7], seed=3)]
    inputs = {key: torch.cat([row[key] for row in rows]) for key in rows[0]}
    model = chunk_model(tiny_llama(), ChunkConfig(chunk_size=7))
    assert largest_difference(gradients(model, inputs), gradients(tiny_llama(), inputs)) < 1e-10


@pytest.mark.parametrize("height", [1, 2, "all"])
def test_twenty_optimizer_steps(height: Any) -> None:
    models = [tiny_llama(), chunk_model(tiny_llama(), ChunkConfig(chunk_size=7, layers_per_group=height))]
    for model in models:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for step in range(20):
            gradients(model, batch(num_tokens=20 + step, seed=step))
            optimizer.step()
    plain, chunked = models
    for name, parameter in plain.named_parameters():
        assert (parameter - chunked.get_parameter(name)).norm() <= 1e-8 * parameter.norm()


@pytest.mark.parametrize("height", [1, "all"])
@pytest.mark.parametrize("seed", range(3))
def test_bf16_is_as_near_to_the_truth_as_the_plain_model(seed: int, height: Any) -> None:
    """Never further from the fp64 gradients than the unchunked bf16 model plus 10 %, over all parameters
    together."""
    inputs = batch(num_tokens=96, seed=seed)
    weights = tiny_llama(dtype=torch.bfloat16, seed=seed, initializer_range=0.1).state_dict()

    def grads(dtype: torch.dtype, config: ChunkConfig | None) -> Tensor:
        model = tiny_llama()
        model.load_state_dict(weights)
        model.to(dtype)
        if config is not None:
            chunk_model(model, config)
        return torch.cat(
            [g.double().flatten() for name, g in gradients(model, inputs).items() if name != "loss"]
        )

    truth = grads(torch.float64, None)
    plain = (grads(torch.bfloat16, None) - truth).norm()
    for attention in ("math", "cpu_flash"):
        config = ChunkConfig(chunk_size=16, layers_per_group=height, attention=attention)  # type: ignore[arg-type]
        assert (grads(torch.bfloat16, config) - truth).norm() <= 1.1 * plain


@pytest.mark.parametrize("broken", ["prefix gradients", "descending order", "segments", "head tiles"])
def test_a_fault_is_seen(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above fails when the engine is broken."""
    from chunkdist.engine import group as layer_group
    from chunkdist.loss import cross_entropy as loss
    from chunkdist.stores.kv_store import KVStore
    from chunkdist.stream.stream import Chunk, Stream

    if broken == "prefix gradients":
        real_grads_of = KVStore.grads_of

        def without_first_key(self: KVStore, chunk: Chunk) -> tuple[Tensor, Tensor] | None:
            dk, dv = real_grads_of(self, chunk) or pytest.fail("nothing was left")
            return torch.cat([dk[:, :1] * 0, dk[:, 1:]], 1), dv

        monkeypatch.setattr(KVStore, "grads_of", without_first_key)
    elif broken == "descending order":
        monkeypatch.setattr(layer_group, "reversed", lambda x: x, raising=False)
    elif broken == "segments":
        monkeypatch.setattr(Stream, "segment_starts", property(lambda self: ((0,),)), raising=False)
        monkeypatch.setattr(Stream, "__init__", _init_without_segments)
    else:
        monkeypatch.setattr(loss, "tiles_with_labels", lambda *args: [0])
        monkeypatch.setattr(loss, "tile_tokens", lambda *args: 16)
    model = chunk_model(tiny_llama(), ChunkConfig(chunk_size=7))
    found, truth = gradients(model, INPUTS["packed"]()), expected("full", "packed")
    assert max((found[name] - truth[name]).norm() / truth[name].norm() for name in truth) > 1e-4


def _init_without_segments(self: Any, *, num_tokens: int, chunks: Any, segment_starts: Any) -> None:
    object.__setattr__(self, "num_tokens", num_tokens)
    object.__setattr__(self, "chunks", chunks)


def test_bf16_sums_of_many_chunks() -> None:
    """Parameter gradients are summed in fp32: 200 chunks lose no more than one."""
    inputs = batch(num_tokens=200)
    weights = tiny_llama(dtype=torch.bfloat16, initializer_range=0.1).state_dict()

    def grads(dtype: torch.dtype, chunk_size: int) -> Tensor:
        model = tiny_llama()
        model.load_state_dict(weights)
        chunk_model(model.to(dtype), ChunkConfig(chunk_size=chunk_size, attention="math"))
        found = gradients(model, inputs)
        return torch.cat([g.double().flatten() for name, g in found.items() if name != "loss"])

    truth = grads(torch.float64, 200)
    whole, cut = ((grads(torch.bfloat16, size) - truth).norm() for size in (200, 1))
    assert cut <= 1.1 * whole
