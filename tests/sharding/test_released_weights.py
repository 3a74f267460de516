"""Between forward and backward, a chunked model holds on to no weight: engines can release them all."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from chunkdist import ChunkConfig, chunk_model
from tests.helpers.models import batch, gradients, largest_difference, tiny_llama, with_lora

MODELS: dict[str, Callable[[], nn.Module]] = {"full": tiny_llama, "LoRA": lambda: with_lora(tiny_llama())}


@pytest.mark.parametrize("retained_chunks", [0, 3])
@pytest.mark.parametrize("name", MODELS)
def test_weights_may_move_between_forward_and_backward(name: str, retained_chunks: int) -> None:
    """As under ZeRO-3: released after the forward, elsewhere in memory in the backward."""
    inputs = batch()
    config = ChunkConfig(chunk_size=7, layers_per_group=1, retained_chunks=retained_chunks, attention="math")
    model = chunk_model(MODELS[name](), config)
    loss = model(**inputs).loss
    parameters = [p for path, p in model.named_parameters() if ".layers." in path]
    assert parameters
    copies = [p.detach().clone() for p in parameters]
    storages = [StorageWeakRef(p.untyped_storage()) for p in parameters]
    for parameter in parameters:
        parameter.data = parameter.data.new_empty(0)
    assert all(storage.expired() for storage in storages)
    for parameter, copy in zip(parameters, copies, strict=True):
        parameter.data = copy
    loss.backward()
    found = {path: p.grad for path, p in model.named_parameters() if p.grad is not None}
    assert largest_difference({"loss": loss.detach(), **found}, gradients(MODELS[name](), inputs)) < 1e-10


def test_views_of_one_storage_are_told_apart() -> None:
    """Engines gather several weights into one buffer."""
    inputs = batch()
    model = chunk_model(tiny_llama(), ChunkConfig(chunk_size=7, retained_chunks=3, attention="math"))
    parameters = [p for path, p in model.named_parameters() if ".layers." in path]
    buffer = torch.cat([p.detach().flatten() for p in parameters])
    for parameter, piece in zip(parameters, buffer.split([p.numel() for p in parameters]), strict=True):
        parameter.data = piece.view_as(parameter)
    assert largest_difference(gradients(model, inputs), gradients(tiny_llama(), inputs)) < 1e-10
