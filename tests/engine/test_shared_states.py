"""Layers with state between tokens share prefixes, in whole chunks: a branch begins with the state that its
prefix has left, and what comes back from all branches is added."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
from torch import Tensor

from chunkdist import ChunkConfig, chunk_model
from chunkdist.stores.state_relay import StateRelay
from chunkdist.stream.stream import Chunk, Stream
from tests.engine.test_sharing import Paths, completions, count_tokens, draw, four_levels, rows_of
from tests.helpers.hybrids import model_of
from tests.helpers.models import gradients, gradients_alone, largest_difference
from tests.helpers.sweep import double_precision

KINDS = {
    "delta rule": "Qwen3_5ForCausalLM",
    "state space, MLP and MoE": "NemotronHForCausalLM",
    "convolution": "Lfm2ForCausalLM",
    "attention and state space in one layer": "FalconH1ForCausalLM",
}
CHUNK_SIZE = 5


def paths() -> Paths:
    """Branches of one token, a row that another begins with, equal rows, and two trees."""
    more = completions(11, 1, 4, 9, 1)
    return [*four_levels(), *more, more[1], more[2][:-3], draw(3, 20)]


@lru_cache
def expected(name: str) -> dict[str, Tensor]:
    with double_precision():
        return gradients_alone(model_of(name), rows_of(paths()))


def error_of(name: str, padding: str = "right", **settings: Any) -> float:
    given = {"chunk_size": CHUNK_SIZE, "attention": "math", "share_prefixes": True, **settings}
    with double_precision():
        model = chunk_model(model_of(name), ChunkConfig(**given))
        return largest_difference(gradients(model, rows_of(paths(), padding=padding)), expected(name))


@pytest.mark.parametrize("name", KINDS.values(), ids=list(KINDS))
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"layers_per_group": "all", "retained_chunks": 2},
        {"layers_per_group": 2, "rebuild_kv": True, "chunk_size": 1},
    ],
    ids=str,
)
def test_gradients(name: str, settings: dict[str, Any]) -> None:
    assert error_of(name, **settings) < 1e-10


@pytest.mark.parametrize(
    "settings",
    [
        {"chunk_size": 7, "share_prefixes": "auto", "padding": "left"},
        {"offload": "host"},
        {"offload": "host", "layers_per_group": 2, "keep_attention": True, "retained_chunks": 100},
        {"keep_attention": True, "rebuild_kv": False},
    ],
    ids=str,
)
def test_schedules(settings: dict[str, Any]) -> None:
    assert error_of(KINDS["delta rule"], **settings) < 1e-10


def test_whole_chunks_of_a_prefix_are_computed_once() -> None:
    """Of the 19 tokens of the prompt 15, and 4 in each row."""
    model = chunk_model(model_of(KINDS["delta rule"]).float(), ChunkConfig(chunk_size=5))
    inputs = rows_of(completions(19, 6, 11, 3))
    assert count_tokens(model, inputs) == 15 + 3 * 4 + 6 + 11 + 3


def test_a_lost_state_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """That with which a branch begins."""
    real = Stream.behind

    def behind(self: Stream, chunk: Chunk) -> tuple[int, ...]:
        return tuple(start for start in real(self, chunk) if start == chunk.end)

    monkeypatch.setattr(Stream, "behind", behind)
    with pytest.raises(AssertionError, match="Scalars are not close"):  # of the losses
        error_of(KINDS["delta rule"])


def test_a_lost_gradient_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of a sibling's state."""
    real = StateRelay.hand_back

    def hand_back(self: StateRelay) -> None:
        self._store.grads.pop(self._before, None)
        real(self)

    monkeypatch.setattr(StateRelay, "hand_back", hand_back)
    assert error_of(KINDS["delta rule"]) > 1e-4
