"""Which sequences each step trains on follows from a few values: checkpoints hold them, and a run that goes
on must have the same, or it would repeat some sequences and skip others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

_NAMES = {
    "batch_sequences": "ranks x per_device_train_batch_size x gradient_accumulation_steps",
    "num_samples": "number of training samples",
    "seed": "data_seed (or seed)",
    "sampling": "train_sampling_strategy",
    "pipeline": "layers of each stage, replicas and whether they share weights (pipeline_*)",
}


class StreamOrder(TrainerCallback, ExportableState):
    """Does nothing but be written to `trainer_state.json`."""

    def __init__(self, *, batch_sequences: int, num_samples: int, seed: int, sampling: str) -> None:
        self.values: dict[str, Any] = {
            "batch_sequences": batch_sequences,
            "num_samples": num_samples,
            "seed": seed,
            "sampling": sampling,
        }

    def state(self) -> dict[str, Any]:
        return {"args": self.values, "attributes": {}}


def refuse_other_order(checkpoint: Path, order: StreamOrder | None) -> None:
    """Compares a run with the one that has saved `checkpoint`.

    Args:
        order: The run's order; `None`: without `chunk_packing`.

    Raises:
        ValueError: its steps would have other sequences; says which values differ.
    """
    state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    saved = (state.get("stateful_callbacks") or {}).get(StreamOrder.__name__)
    if saved is None and order is None:
        return
    if saved is None or order is None:
        raise ValueError(
            f"{checkpoint} was saved with chunk_packing={saved is not None}, and this job has "
            f"chunk_packing={order is not None}: steps would repeat some sequences and skip others; write "
            "what it was, or leave resume_from_checkpoint out"
        )
    differ = [
        f"{_NAMES[name]} was {saved['args'][name]} and is {value}"
        for name, value in order.values.items()
        if saved["args"][name] != value
    ]
    if differ:
        raise ValueError(
            f"{checkpoint} cannot go on: {', '.join(differ)}; steps would repeat some sequences and skip "
            "others: write what it was, or leave resume_from_checkpoint out"
        )
