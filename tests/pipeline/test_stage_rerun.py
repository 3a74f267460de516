"""What a stage's cells are when they are run again is what they were, or an error, as in layer groups."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from chunkdist import UnsupportedModelError
from chunkdist.pipeline.cell import StageCell
from tests.helpers.models import norms_in_fp64, tiny_llama
from tests.helpers.sweep import difference, double_precision
from tests.pipeline.stages_here import staged_step, whole_step

CUT = [range(1), range(1, 2)]


class Around(nn.Module):
    def __init__(self, inner: nn.Module, change: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.change = inner, change
        self.register_buffer("figure", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self, self.inner(x))


def model_around(change: Callable[[Any, Tensor], Tensor]) -> Any:
    model: Any = norms_in_fp64(tiny_llama(num_layers=2))
    model.model.layers[1].mlp = Around(model.model.layers[1].mlp, change)
    return model


STATE = SimpleNamespace(strength=1.5)
"""Not a part of the model, which each stage has a copy of."""


def scaled(module: Any, x: Tensor) -> Tensor:
    return x * STATE.strength


@pytest.mark.parametrize("retained", [0, 1])
def test_what_is_read_elsewhere_and_stays(retained: int) -> None:
    with double_precision():
        model = model_around(scaled)
        assert difference(whole_step(model), staged_step(model, CUT, retained_chunks=retained)) is None


@pytest.mark.parametrize("retained", [0, 1])
def test_what_is_read_elsewhere_has_changed(retained: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A retained chunk is not run again; the others are."""
    real = StageCell.backward

    def backward(self: StageCell, *given: Any) -> Any:
        monkeypatch.setattr(STATE, "strength", 1.0)
        return real(self, *given)

    monkeypatch.setattr(StageCell, "backward", backward)
    with double_precision(), pytest.raises(UnsupportedModelError, match="came to other hidden states"):
        staged_step(model_around(scaled), CUT, retained_chunks=retained)


def counted(module: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        module.figure += x.shape[1]
    return x


def test_buffers_that_are_written_to() -> None:
    with (
        double_precision(),
        pytest.raises(UnsupportedModelError, match="the buffer figure of Around is written to"),
    ):
        staged_step(model_around(counted), CUT)
