"""torch.compile beside chunks: parts of layers are compiled, the loop over chunks is not, and gradients are
exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from chunkdist import ChunkConfig, chunk_model
from tests.helpers.models import batch, gradients, largest_difference, tiny_llama


class Backend:
    """Compiles nothing, and counts what it is given."""

    def __init__(self) -> None:
        self.num_graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        self.num_graphs += 1
        return graph.forward


def parts(model: Any, backend: Any) -> nn.Module:
    for layer in model.model.layers:
        for part in (layer.mlp, layer.input_layernorm, layer.post_attention_layernorm):
            part.compile(backend=backend)
    return model


def layers(model: Any, backend: Any) -> nn.Module:
    for layer in model.model.layers:
        layer.compile(backend=backend)
    return model


def forwards_of_layers(model: Any, backend: Any) -> nn.Module:
    for layer in model.model.layers:
        layer.forward = torch.compile(layer.forward, backend=backend)
    return model


def whole(model: Any, backend: Any) -> Any:
    return torch.compile(model, backend=backend)


CASES: dict[str, tuple[Callable[[Any, Any], Any], bool, bool]] = {
    "parts of layers": (parts, True, True),
    "parts, of a chunked model": (parts, False, True),
    "forwards of layers": (forwards_of_layers, True, True),
    "chunked layers": (layers, False, False),
    "a chunked model": (whole, False, False),
}
"""What is compiled, whether before `chunk_model`, and whether anything of a chunk is."""


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_exact(name: str) -> None:
    compiled, is_before, compiles = CASES[name]
    torch._dynamo.reset()
    expected = gradients(tiny_llama(num_layers=2), batch(num_tokens=20))
    backend, model = Backend(), tiny_llama(num_layers=2)
    config = ChunkConfig(chunk_size=8, attention="math")
    if is_before:
        model = chunk_model(compiled(model, backend), config)
    else:
        model = compiled(chunk_model(model, config), backend)
    found = gradients(model, batch(num_tokens=20))
    found = {key.removeprefix("_orig_mod."): x for key, x in found.items()}
    assert largest_difference(found, expected) < 1e-12
    assert (backend.num_graphs > 0) == compiles


def test_graphs_of_the_backward_too() -> None:
    """With AOTAutograd, as inductor has it, and a cell whose graph is kept."""
    torch._dynamo.reset()
    expected = gradients(tiny_llama(num_layers=2), batch(num_tokens=20))
    model = parts(tiny_llama(num_layers=2), "aot_eager")
    chunk_model(model, ChunkConfig(chunk_size=8, attention="math", layers_per_group=2, retained_chunks=1))
    assert largest_difference(gradients(model, batch(num_tokens=20)), expected) < 1e-12


def test_a_compiled_model_is_refused() -> None:
    model: Any = torch.compile(tiny_llama(num_layers=2), backend="eager")
    with pytest.raises(ValueError, match=r"before DDP, FSDP, DeepSpeed or torch\.compile wrap it"):
        chunk_model(model, ChunkConfig(chunk_size=8))
