"""Chunked layers under FSDP2, in one process."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

from chunkdist import ChunkConfig, chunk_model
from chunkdist.sharding.fsdp2 import device_of
from chunkdist.train.launch.gloo import use_one_gloo_thread
from tests.helpers.models import batch, gradients, largest_difference, tiny_llama, with_lora


@pytest.fixture(autouse=True)
def one_rank() -> Iterator[None]:
    use_one_gloo_thread()
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def whole(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: getattr(x, "full_tensor", lambda x=x: x)() for name, x in found.items()}


@pytest.mark.parametrize("units", ["layers", "groups"])
@pytest.mark.parametrize("height", [1, 2, 4])
@pytest.mark.parametrize("config", [{"retained_chunks": 2}, {"chunk_size": 1000}])
@pytest.mark.parametrize("make", [tiny_llama, lambda: with_lora(tiny_llama())], ids=["full", "LoRA"])
def test_no_layer_returns_a_view(make: Any, config: dict[str, Any], height: int, units: str) -> None:
    """FSDP2 warns of each: its hook is on what a layer returns, an operation in place would drop it."""
    model: Any = chunk_model(make(), ChunkConfig(layers_per_group=height, **{"chunk_size": 7, **config}))
    layers: list[nn.Module] = list(model.get_decoder().layers)
    for start in range(0, len(layers), step := height if units == "groups" else 1):
        fully_shard(layers[start : start + step] if step > 1 else layers[start])
    fully_shard(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*returned a view")
        found = whole(gradients(model, batch()))
    assert largest_difference(found, gradients(make(), batch())) < 1e-10


def test_hidden_states_of_a_unit_of_several_layers() -> None:
    """In evaluation each layer runs alone, whatever the units are."""
    model: Any = chunk_model(tiny_llama(), ChunkConfig(chunk_size=7, layers_per_group=2))
    layers = list(model.model.layers)
    fully_shard(layers[:2])
    fully_shard(layers[2:])
    fully_shard(model)
    with torch.no_grad():
        expected = tiny_llama()(**batch(), output_hidden_states=True).hidden_states
        for mine, theirs in zip(
            model(**batch(), output_hidden_states=True).hidden_states, expected, strict=True
        ):
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
    found = whole(gradients(model, batch()))
    assert largest_difference(found, gradients(tiny_llama(), batch())) < 1e-10


def test_offloaded_weights_run_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the mesh's device; on a GPU, memory would else be planned as the host's."""
    model: Any = chunk_model(tiny_llama(), ChunkConfig(chunk_size=7))
    assert device_of(model).type == "cpu"
    fully_shard(model, offload_policy=CPUOffloadPolicy(pin_memory=False))
    parameter: Any = next(model.parameters())
    monkeypatch.setattr(parameter.device_mesh, "_device_type", "cuda")
    assert parameter.to_local().device.type == "cpu"
    assert device_of(model).type == "cuda"
