"""Hidden states of a chunked model are those of the plain model, and so are gradients through them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from chunkdist import ChunkConfig, IndependentSampler, chunk_model
from tests.helpers.models import batch, packed_batch, padded_batch, tiny_llama

INPUTS = {"one row": batch(), "packed": packed_batch([20, 17]), "padded": padded_batch([20, 11])}


def hidden_states(model: Any, inputs: dict[str, Tensor], **asked: Any) -> tuple[Tensor | None, ...]:
    asked = asked or {"output_hidden_states": True}
    found: tuple[Tensor | None, ...] = model(**inputs, use_cache=False, **asked).hidden_states
    return found


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("height", [1, 2, 3, "all"])
@pytest.mark.parametrize("is_training", [True, False])
def test_in_evaluation(inputs: str, height: Any, is_training: bool) -> None:
    model = chunk_model(tiny_llama(), ChunkConfig(chunk_size=7, layers_per_group=height)).train(is_training)
    seen = INPUTS[inputs].get("attention_mask", torch.ones_like(INPUTS[inputs]["input_ids"])).bool()
    with torch.no_grad():
        expected = hidden_states(tiny_llama(), INPUTS[inputs])
        found = hidden_states(model, INPUTS[inputs])
        assert model(**INPUTS[inputs]).hidden_states is None
    assert len(found) == len(expected) == 5
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine[seen], theirs[seen], rtol=1e-10, atol=1e-10)


def gradients_through(model: Any, index: int, **asked: Any) -> dict[str, Tensor]:
    model.zero_grad()
    output = model(**batch(num_rows=2), use_cache=False, **(asked or {"output_hidden_states": True}))
    weights = torch.sin(torch.arange(output.hidden_states[index].numel()).double())
    (output.loss + (output.hidden_states[index].flatten() * weights).sum()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert max(float((found[name] - x).norm() / x.norm()) for name, x in expected.items()) < 1e-10


@pytest.mark.parametrize("index", [-1, 2, 0])
@pytest.mark.parametrize("config", [{}, {"retained_chunks": 2}, {"offload": "host"}])
def test_gradients_through_them(index: int, config: dict[str, Any]) -> None:
    model = chunk_model(tiny_llama(), ChunkConfig(chunk_size=7, **config))
    assert_same(gradients_through(model, index), gradients_through(tiny_llama(), index))


def test_of_the_config() -> None:
    model, plain = tiny_llama(), tiny_llama()
    model.config.output_hidden_states = plain.config.output_hidden_states = True
    chunk_model(model, ChunkConfig(chunk_size=7))
    asked = {"return_dict": True}
    assert_same(gradients_through(model, 3, **asked), gradients_through(plain, 3, **asked))


@pytest.mark.parametrize(("height", "asked"), [(2, -1), (2, [0, 2, 4]), ("all", [-1]), (3, [3, -1])])
def test_those_between_groups(height: Any, asked: Any) -> None:
    model = chunk_model(tiny_llama(), ChunkConfig(chunk_size=7, layers_per_group=height))
    index = asked if isinstance(asked, int) else asked[len(asked) // 2]
    found, expected = (gradients_through(x, index, output_hidden_states=asked) for x in (model, tiny_llama()))
    assert_same(found, expected)


@pytest.mark.parametrize("asked", [True, 1, [-1, 3], [-2]])
def test_those_inside_of_a_group_are_refused(asked: Any) -> None:
    model = chunk_model(tiny_llama(), ChunkConfig(chunk_size=7, layers_per_group=2))
    with pytest.raises(
        ValueError, match=r"inside of a group exist for one chunk at a time.*layers_per_group=1"
    ):
        model(**batch(), output_hidden_states=asked)
    assert_same(gradients_through(model, -1, output_hidden_states=-1), gradients_through(tiny_llama(), -1))


def test_sampled_chunks_weigh_the_last_ones_only() -> None:
    """The mean gradient through the last hidden states is right; through others it would not be."""
    model = chunk_model(tiny_llama(), ChunkConfig(chunk_size=7, sampler=IndependentSampler(budget=5)))
    with pytest.raises(ValueError, match="with a sampler"):
        model(**batch(), output_hidden_states=True)
    model(**batch(), output_hidden_states=-1).hidden_states[-1].sum().backward()
