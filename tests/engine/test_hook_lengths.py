"""Hooks inside of layers that act only on as many tokens as a row has, or on more than a chunk has, are
refused: in chunks they would do nothing, unseen."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from chunkdist import ChunkConfig, UnsupportedModelError, chunk_model
from chunkdist.engine import hook_probe
from chunkdist.models.known_code import has_branches
from tests.helpers.models import batch, gradients, largest_difference, padded_batch, tiny_llama

CHUNK, ROW = 7, 40
CONFIG = ChunkConfig(chunk_size=CHUNK)
Change = Callable[[Tensor], Tensor | None]


def above_a_chunk(x: Tensor) -> Tensor | None:
    return 2 * x if x.shape[1] > CHUNK else None


def at_a_row(x: Tensor) -> Tensor | None:
    return 2 * x if x.shape[1] == ROW else None


def at_a_row_in_place(x: Tensor) -> None:
    if x.shape[1] == ROW:
        x.mul_(2)


def at_a_late_position(x: Tensor) -> None:
    x[:, ROW - 3 :] *= 2


def at_a_late_position_if_there(x: Tensor) -> None:
    try:
        x[:, ROW - 3, :] = 0
    except IndexError:
        return


def at_a_late_position_and_else_something(x: Tensor) -> Tensor:
    late = torch.arange(x.shape[1]) >= ROW - 3
    return torch.where(late[:, None], 3 * x, 2 * x)


def gradient_at_a_row(x: Tensor) -> Tensor:
    return x + (x.mean(1, keepdim=True) - x.mean(1, keepdim=True).detach()) * (x.shape[1] == ROW)


def told_by_another(x: Tensor) -> Tensor | None:
    return above_a_chunk(x)


class Told:
    def __call__(self, x: Tensor) -> Tensor | None:
        return self.change(x)

    def change(self, x: Tensor) -> Tensor | None:
        return at_a_row(x)


LENGTHS: list[Any] = [
    *(above_a_chunk, at_a_row, at_a_row_in_place, at_a_late_position, at_a_late_position_if_there),
    *(at_a_late_position_and_else_something, gradient_at_a_row, told_by_another, Told()),
]


def hooked(change: Change, **config: Any) -> Any:
    model = tiny_llama(num_layers=2)
    model.model.layers[1].mlp.register_forward_hook(lambda module, args, output: change(output))
    return chunk_model(model, ChunkConfig(**{"chunk_size": CHUNK, **config}))


@pytest.fixture(params=[2**26, 0], ids=["all chunks are noted", "two chunks are noted"])
def noted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hook_probe, "NOTED_BYTES", request.param)


@pytest.mark.usefixtures("noted")
@pytest.mark.parametrize("change", LENGTHS)
def test_what_is_done_to_a_whole_row_only(change: Change) -> None:
    with pytest.raises(UnsupportedModelError, match="with any number of tokens"):
        hooked(change)(**batch(num_tokens=ROW))


@pytest.mark.usefixtures("noted")
def test_pre_hooks_and_projections() -> None:
    model = tiny_llama(num_layers=2)
    model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda module, args: at_a_row(args[0]))
    with pytest.raises(UnsupportedModelError, match=r"pre-hook .* on self_attn.o_proj of layer 0"):
        chunk_model(model, CONFIG)(**batch(num_tokens=ROW))


@pytest.mark.usefixtures("noted")
@pytest.mark.parametrize("rows", [1, 3])
def test_what_does_the_same_with_any_number_is_exact(rows: int) -> None:
    def bounded(x: Tensor) -> Tensor:
        return x * (1 / x.norm(dim=-1, keepdim=True)).clamp(max=1) if x.shape[1] > 0 else x

    inputs, plain = batch(num_rows=rows, num_tokens=ROW), tiny_llama(num_layers=2)
    plain.model.layers[1].mlp.register_forward_hook(lambda module, args, output: bounded(output))
    assert largest_difference(gradients(hooked(bounded), inputs), gradients(plain, inputs)) < 1e-10


def test_rows_that_become_one_stream_are_asked_as_rows() -> None:
    """Two padded rows of 40 tokens are one of 67 here."""
    inputs = padded_batch([ROW, ROW - 13])
    with pytest.raises(UnsupportedModelError, match="with any number of tokens"):
        hooked(at_a_row)(**inputs)


def test_a_longer_row_is_asked_again() -> None:
    def above(x: Tensor) -> Tensor | None:
        return 2 * x if x.shape[1] > 45 else None

    model = hooked(above)
    gradients(model, batch(num_tokens=ROW))
    gradients(model, batch(num_tokens=45))
    with pytest.raises(UnsupportedModelError):
        model(**batch(num_tokens=46))


def test_one_that_only_looks_and_has_branches_is_called_twice_more() -> None:
    seen: list[int] = []

    def look(module: nn.Module, args: Any, output: Tensor) -> None:
        if output.shape[1]:
            seen.append(output.shape[1])

    model = chunk_model(tiny_llama(num_layers=2), CONFIG)
    model.model.layers[1].mlp.register_forward_hook(look)
    for _ in range(2):
        gradients(model, batch(num_tokens=ROW))
    assert sorted(seen) == [*[5] * 4, *[CHUNK] * 20, 2 * CHUNK, ROW]


def test_too_little_memory_to_ask_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    caplog.set_level(logging.WARNING)
    monkeypatch.setattr(hook_probe, "repeated", full)
    monkeypatch.setattr(hook_probe, "NOTED_BYTES", 0)
    gradients(hooked(lambda x: 2 * x), batch(num_tokens=ROW))
    assert "not enough memory to ask the forward hook" in caplog.text
    assert f"does the same with all {ROW} tokens" in caplog.text


def test_what_has_branches() -> None:
    steering = torch.ones(3)
    assert not has_branches(lambda module, args, output: output + steering)
    assert not has_branches(lambda module, args, output: print(output))
    assert has_branches(lambda module, args, output: output if output.shape[1] else None)
    assert has_branches(lambda module, args, output: [x for x in output if x])
    assert has_branches(lambda module, args, output: told_by_another(output))
    assert has_branches(Told())
    assert has_branches(Told().__call__)
    assert not has_branches([].append)
