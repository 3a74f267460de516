"""Whether the weights of a checkpoint are those of the model: asked of checkpoints that know no run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from transformers.utils import SAFE_WEIGHTS_NAME

from chunkdist.train.checkpoints.model_parts import ADAPTER_WEIGHTS, weights_name


def refuse_other_weights(checkpoint: Path, model: Any) -> None:
    """Compares names and shapes of what one process or DDP has saved; transformers (5.23) would warn of
    names and leave those weights as they are.

    Raises:
        ValueError: it is another model's, an adapter of another rank, or a whole model's instead of an
        adapter's.
    """
    own = weights_name(model)
    path = checkpoint / own
    if not path.exists():
        for name, kind in (
            (ADAPTER_WEIGHTS, "an adapter (use_peft: true)"),
            (SAFE_WEIGHTS_NAME, "a whole model"),
        ):
            if name != own and (checkpoint / name).exists():
                raise ValueError(
                    f"{checkpoint} holds {kind}, and this job trains another kind: write what it was"
                )
        return
    state = get_peft_model_state_dict(model) if isinstance(model, PeftModel) else model.state_dict()
    with safe_open(path, framework="pt") as saved:
        shapes = {name: tuple(saved.get_slice(name).get_shape()) for name in saved.keys()}  # noqa: SIM118
    for name, shape in shapes.items():
        found = tuple(state[name].shape) if name in state else None
        if found != shape:
            has = "has none of that name" if found is None else f"has {found}"
            raise ValueError(
                f"{checkpoint} is of another model or adapter: its {name} has shape {shape}, and this "
                f"one {has}"
            )
