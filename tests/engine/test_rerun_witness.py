"""What a rerun reads beside its modules, buffers that are written to, hooks between the layers of a group,
and gradients of gradients are refused before a step is taken with a wrong gradient."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from chunkdist import ChunkConfig, UnsupportedModelError, chunk_model
from tests.helpers.models import batch, gradients, largest_difference, tiny_llama

CONFIGS = {
    "rerun": ChunkConfig(chunk_size=7),
    "one group": ChunkConfig(chunk_size=7, layers_per_group="all"),
    "K/V kept, one retained": ChunkConfig(chunk_size=7, retained_chunks=1, rebuild_kv=False),
}
STRENGTH: ContextVar[float] = ContextVar("strength", default=1.5)
Change = Callable[[], object]


def mlp(model: Any) -> Any:
    return model.model.layers[1].mlp


class Around(nn.Module):
    def __init__(self, inner: nn.Module, change: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.change = inner, change
        self.register_buffer("figure", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self, self.inner(x))


def steered_by_an_object(model: Any) -> Change:
    state = SimpleNamespace(strength=1.5)
    mlp(model).register_forward_hook(lambda module, args, output: output * state.strength)
    return lambda: setattr(state, "strength", 1.0)


def module_that_reads_an_object(model: Any) -> Change:
    state = SimpleNamespace(strength=1.5)
    model.model.layers[1].mlp = Around(mlp(model), lambda self, x: x * state.strength)
    return lambda: setattr(state, "strength", 1.0)


def module_that_reads_a_context(model: Any) -> Change:
    token = STRENGTH.set(3.0)
    model.model.layers[1].mlp = Around(mlp(model), lambda self, x: x * STRENGTH.get())
    return lambda: STRENGTH.reset(token)


def written_through_data(model: Any) -> Change:
    def write() -> None:
        mlp(model).up_proj.weight.data[3, 5:9] += 0.5

    return write


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(
    "steer",
    [
        steered_by_an_object,
        module_that_reads_an_object,
        module_that_reads_a_context,
        written_through_data,
    ],
)
def test_what_is_read_elsewhere_has_changed(steer: Callable[[Any], Change], config: str) -> None:
    model = tiny_llama(num_layers=2)
    change = steer(model)
    loss = chunk_model(model, CONFIGS[config])(**batch()).loss
    change()
    with pytest.raises(UnsupportedModelError, match="came to other hidden states"):
        loss.backward()


@pytest.mark.parametrize("config", CONFIGS)
def test_what_is_read_elsewhere_and_stays(config: str) -> None:
    expected, found = (tiny_llama(num_layers=2) for _ in range(2))
    steered_by_an_object(expected)
    steered_by_an_object(found)
    chunk_model(found, CONFIGS[config])
    assert largest_difference(gradients(found, batch()), gradients(expected, batch())) < 1e-10


def mean(self: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        self.figure.mul_(0.9).add_(x.abs().mean())
    return x


def replaced(self: Any, x: Tensor) -> Tensor:
    self.figure = self.figure + x.shape[1]
    return x


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("figure", [mean, replaced])
def test_buffers_that_are_written_to(figure: Any, config: str) -> None:
    model = tiny_llama(num_layers=2)
    model.model.layers[1].mlp = Around(mlp(model), figure)
    with pytest.raises(UnsupportedModelError, match="the buffer figure of Around is written to"):
        chunk_model(model, CONFIGS[config])(**batch())


def test_a_buffer_that_a_hook_writes_to() -> None:
    model = tiny_llama(num_layers=2)
    mlp(model).register_buffer("figure", torch.zeros((), dtype=torch.float64))
    mlp(model).register_forward_pre_hook(lambda module, args: module.figure.add_(1) and None)
    with pytest.raises(UnsupportedModelError, match="the buffer figure of LlamaMLP is written to"):
        chunk_model(model, CONFIGS["rerun"])(**batch())


HOOKS: dict[str, Callable[[Any], Any]] = {
    "what the first returns": lambda m: m[0].register_forward_hook(lambda *args: None),
    "what the second gets": lambda m: m[1].register_forward_pre_hook(lambda *args: None),
    "gradients": lambda m: m[0].register_full_backward_hook(lambda *args: None),
    "gradients before": lambda m: m[0].register_full_backward_pre_hook(lambda *args: None),
}


@pytest.mark.parametrize("name", HOOKS)
def test_hooks_between_the_layers_of_a_group(name: str) -> None:
    model = chunk_model(tiny_llama(num_layers=2), CONFIGS["one group"])
    HOOKS[name](model.model.layers)
    with pytest.raises(UnsupportedModelError, match="write layers_per_group=1"):
        model(**batch())


def test_hooks_at_the_ends_of_a_group() -> None:
    seen: list[Tensor] = []
    model = chunk_model(tiny_llama(num_layers=2), CONFIGS["one group"])
    model.model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.model.layers[1].register_forward_hook(lambda module, args, output: seen.append(output))
    found = gradients(model, batch())
    assert largest_difference(found, gradients(tiny_llama(num_layers=2), batch())) < 1e-10
    assert len(seen) == 2


@pytest.mark.parametrize("trains", ["layers", "head"])
def test_a_graph_of_gradients(trains: str) -> None:
    """Those of a chunked model have none: a penalty of them would train nothing."""
    model = chunk_model(tiny_llama(num_layers=2), CONFIGS["rerun"])
    weights = model.lm_head.weight if trains == "head" else mlp(model).up_proj.weight
    model.requires_grad_(False)
    weights.requires_grad_(True)
    with pytest.raises(ValueError, match="create_graph=True"):
        torch.autograd.grad(model(**batch()).loss, [weights], create_graph=True)


def test_parametrized_weights_in_a_cache() -> None:
    model = tiny_llama(num_layers=2)
    parametrizations.weight_norm(mlp(model).down_proj)
    gradients(chunk_model(model, CONFIGS["rerun"]), batch())
    with parametrize.cached(), pytest.raises(ValueError, match=r"parametrize\.cached"):
        model(**batch())
    with parametrize.cached(), torch.no_grad():
        model(**batch())


def test_a_layer_that_is_used_twice() -> None:
    model = tiny_llama(num_layers=3)
    model.model.layers[2] = model.model.layers[1]
    with pytest.raises(UnsupportedModelError, match="uses one layer several times"):
        chunk_model(model, CONFIGS["rerun"])
