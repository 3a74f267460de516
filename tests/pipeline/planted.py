"""Errors that are raised inside a cell."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.pipeline.pipeline_steps import PipelineCase, _pipeline, _samples


class PlantedError(RuntimeError):
    """A kind of error that nobody else raises; with a cause, as some errors have."""


def errors_in_cells() -> dict[str, str]:
    """What a step of one stage raises, by the pass in which a layer fails: its kind, message and cause."""
    said = {}
    for name in ("forward", "backward"):
        pipeline, model, _ = _pipeline(PipelineCase(lengths=(20,), retained_chunks=0))

        def fail(layer: nn.Module, args: Any, name: str = name) -> None:
            if (name == "backward") == torch.is_grad_enabled():
                raise PlantedError(f"in the {name}") from KeyError("why")

        model.model.layers[-1].mlp.register_forward_pre_hook(fail)
        try:
            pipeline.step(_samples(PipelineCase(lengths=(20,))))
        except RuntimeError as error:
            said[name] = f"{type(error).__name__}: {error} from {error.__cause__!r}"
    return said
