"""The files of a saved model, one by one: what is tried before training, and what is still written when
`save_pretrained` fails at its end. The weights go first then."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.utils import SAFE_WEIGHTS_NAME

from chunkdist.models.extend import context_extension

if TYPE_CHECKING:
    from transformers import Trainer

ADAPTER_WEIGHTS = "adapter_model.safetensors"


def weights_name(model: Any) -> str:
    """The file of a model's weights, where they are in one."""
    return ADAPTER_WEIGHTS if isinstance(model, PeftModel) else SAFE_WEIGHTS_NAME


def small_parts(trainer: Trainer) -> dict[str, Callable[[Path], Any]]:
    """Everything but the weights, by the names a person knows: functions that write it into a folder."""
    model: Any = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    parts: dict[str, Callable[[Path], Any]] = {}
    if isinstance(model, PeftModel):
        config: Any
        for config in model.peft_config.values():
            parts["the adapter's config (adapter_config.json)"] = config.save_pretrained
    else:
        parts["the model's config (config.json)"] = model.config.save_pretrained
        if model.can_generate():
            parts["generation_config.json"] = model.generation_config.save_pretrained
    if trainer.processing_class is not None:
        parts["the tokenizer"] = trainer.processing_class.save_pretrained
    parts[TRAINING_ARGS_NAME] = lambda folder: torch.save(trainer.args, folder / TRAINING_ARGS_NAME)
    return parts


def save_parts(trainer: Trainer, folder: Path, state_dict: Mapping[str, Tensor] | None) -> list[str]:
    """Writes the weights, and then what can be written of the rest; returns what could not, with its
    reason."""
    model: Any = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    folder.mkdir(parents=True, exist_ok=True)
    state = dict(model.state_dict() if state_dict is None else state_dict)
    if isinstance(model, PeftModel):
        state = get_peft_model_state_dict(model, state_dict=state, save_embedding_layers=False)
    save_file(_own_memory(state), folder / weights_name(model), metadata={"format": "pt"})
    failed = []
    for name, save in small_parts(trainer).items():
        try:
            save(folder)
        except Exception as error:  # whatever it is, the weights are there
            failed.append(f"{name}: {type(error).__name__}: {first_words(error)}")
    return failed


def save_context(model: Any, folder: Path) -> None:
    """Adapters of a model that was set up for longer sequences belong to a base model with that config: it is
    written beside them."""
    extension = context_extension(model) if isinstance(model, PeftModel) else None
    if extension is not None and extension.tokens > extension.before:
        model.get_base_model().config.save_pretrained(folder)


def first_words(error: BaseException) -> str:
    """An error's message in one line that is not too long."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:297]}..."


def _own_memory(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """safetensors refuses tensors that share memory; tied ones are written twice."""
    seen: set[int] = set()
    owned = {}
    for name, value in state.items():
        tensor = value.detach().cpu().contiguous()
        shares = tensor.untyped_storage().data_ptr() in seen
        seen.add(tensor.untyped_storage().data_ptr())
        owned[name] = tensor.clone() if shares or tensor.storage_offset() else tensor
    return owned
