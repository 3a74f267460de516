"""How a run has ended: whether anything was trained, and whether it is worth keeping."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from chunkdist.train.checkpoints.model_parts import first_words
from chunkdist.train.checkpoints.saving import PartlySavedError, save_model
from chunkdist.train.launch.agreement import any_rank
from chunkdist.train.launch.output import print_once

if TYPE_CHECKING:
    from chunkdist.train.trainers.kept import KeptTrainer

NOTHING_TRAINED = 3
"""The exit status of a run that took no step, or whose weights or losses are no numbers."""


@dataclass(frozen=True, kw_only=True)
class Ending:
    """The exit status, and the line of one that is not 0."""

    status: int = 0
    line: str = ""


def end_run(trainer: KeptTrainer) -> Ending:
    """Saves the trained model, unless nothing was trained. Collective."""
    in_vain = _nothing_to_save(trainer)
    if in_vain is not None:
        return Ending(status=NOTHING_TRAINED, line=in_vain)
    try:
        target = save_model(trainer)
    except PartlySavedError as error:
        return Ending(status=1, line=str(error))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if losses and not math.isfinite(losses[-1]):
        return Ending(
            status=NOTHING_TRAINED,
            line=f"training ended with loss {losses[-1]}; its weights, which are finite, are in {target}",
        )
    if trainer.end_failure is not None:
        failure = f"{type(trainer.end_failure).__name__}: {first_words(trainer.end_failure)}"
        return Ending(
            status=1, line=f"the model is saved to {target}, but what follows a training failed: {failure}"
        )
    print_once(f"model saved to {target}")
    return Ending()


def _nothing_to_save(trainer: KeptTrainer) -> str | None:
    """Why the model is not worth saving; `None`: it is. Collective."""
    target, state = trainer.args.output_dir, trainer.state
    if trainer.steps_taken == 0:
        if trainer.first_step and trainer.first_step >= state.max_steps:
            return None  # resumed at its end
        skipped = state.global_step - trainer.first_step
        why = f"all {skipped} steps were skipped for their gradients" if skipped else "no step was taken"
        return f"nothing was trained, {why}: no model is saved to {target}"
    if any_rank(any(not bool(torch.isfinite(values).all()) for values in _trained(trainer.model_wrapped))):
        return (
            f"training ended with weights that are NaN or infinite, which are not saved to {target}: "
            "begin again with a lower learning rate, or from an earlier checkpoint"
        )
    return None


def _trained(model: Any) -> Iterator[Tensor]:
    """The parts of the trained parameters that this rank has; of ZeRO-3's, DeepSpeed (0.19) keeps them as
    `ds_tensor`."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            values = getattr(parameter, "ds_tensor", parameter.detach())
            yield values.to_local() if isinstance(values, DTensor) else values
