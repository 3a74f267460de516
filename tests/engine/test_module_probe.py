"""Modules of users' own that do something else with as many tokens as a row has are refused."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from chunkdist import ChunkConfig, UnsupportedModelError, chunk_model
from chunkdist.check.gradients import check_gradients
from chunkdist.engine import module_probe
from tests.helpers.models import batch, gradients, largest_difference, tiny_llama

CHUNK, ROW, LONG = 7, 40, 200
"""The last is longer than what a layer is asked with."""


class Around(nn.Module):
    def __init__(self, inner: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.change = inner, change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self.inner(x))


def above(x: Tensor) -> Tensor:
    return x + x.mean(1, keepdim=True) if x.shape[1] > 150 else x


def at_a_row(x: Tensor) -> Tensor:
    return 2 * x if x.shape[1] == LONG else x


def at_a_late_position(x: Tensor) -> Tensor:
    late = torch.arange(x.shape[1]) >= LONG - 3
    return torch.where(late[:, None], 3 * x, 2 * x)


def always(x: Tensor) -> Tensor:
    return torch.tanh(x) if x.shape[1] > 0 else x


def around(layer: Any, change: Any) -> None:
    layer.mlp = Around(layer.mlp, change)


def around_a_projection(layer: Any, change: Any) -> None:
    layer.self_attn.o_proj = Around(layer.self_attn.o_proj, change)


def forward_set(layer: Any, change: Any) -> None:
    own = layer.mlp.forward
    layer.mlp.forward = lambda x: change(own(x))


PLACES = [around, around_a_projection, forward_set]


def model_with(place: Any, change: Any, dtype: torch.dtype = torch.float64) -> Any:
    model = tiny_llama(num_layers=2, dtype=dtype)
    place(model.model.layers[1], change)
    return model


@pytest.fixture(params=[2**26, 0], ids=["all chunks are noted", "one chunk is noted"])
def noted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_probe, "NOTED_BYTES", request.param)


@pytest.mark.usefixtures("noted")
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("change", [above, at_a_row, at_a_late_position])
def test_what_is_done_to_a_whole_row_only(place: Any, change: Any) -> None:
    model = chunk_model(model_with(place, change), ChunkConfig(chunk_size=CHUNK))
    gradients(model, batch(num_tokens=ROW))
    with pytest.raises(UnsupportedModelError, match="does not do the same with any number of tokens"):
        model(**batch(num_tokens=LONG))


@pytest.mark.usefixtures("noted")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("place", PLACES)
def test_what_does_the_same_with_any_number_is_exact(place: Any, dtype: torch.dtype) -> None:
    inputs, expected = batch(num_rows=2, num_tokens=LONG), model_with(place, always, dtype)
    found = chunk_model(model_with(place, always, dtype), ChunkConfig(chunk_size=CHUNK))
    for _ in range(2):
        grads = gradients(found, inputs)
    if dtype == torch.float64:
        assert largest_difference(grads, gradients(expected, inputs)) < 1e-10


def test_a_module_around_attention_is_left_to_the_layers_probe() -> None:
    class Attention(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.inner(*args, **kwargs)

    plain, model = tiny_llama(num_layers=2), tiny_llama(num_layers=2)
    for each in (plain, model):
        each.model.layers[1].self_attn = Attention(each.model.layers[1].self_attn)
    inputs = batch(num_tokens=ROW)
    found = gradients(chunk_model(model, ChunkConfig(chunk_size=CHUNK)), inputs)
    assert largest_difference(found, gradients(plain, inputs)) < 1e-10


def test_too_little_memory_to_ask_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    caplog.set_level(logging.WARNING)
    monkeypatch.setattr(module_probe, "repeated", full)
    gradients(chunk_model(model_with(around, always), ChunkConfig(chunk_size=CHUNK)), batch(num_tokens=ROW))
    assert f"does the same with all {ROW} tokens" in caplog.text


def test_the_gradient_check_refuses() -> None:
    model = model_with(around, above, torch.float32)
    with pytest.raises(UnsupportedModelError, match="does not do the same"):
        check_gradients(model, batch(num_tokens=LONG), ChunkConfig(chunk_size=64))
