"""Rows of tokens for the gradient check, of the trainers whose samples are not one row each."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Trainer

_NOT_THE_MODELS = ("completion_mask", "margin", "ref_chosen_logps", "ref_rejected_logps")


def first_rows(trainer: Any, min_tokens: int) -> dict[str, Any]:
    """What the model is called with for the first sample whose rows have `min_tokens` tokens: a chosen and a
    rejected one, or a prompt. A reward model gets labels of its scores.

    Raises:
        ValueError: all are shorter.
    """
    for sample in trainer.train_dataset:
        if "chosen_ids" in sample:
            rows = dict(trainer.data_collator([sample]))
        else:
            rows = _prompt_rows(sample["prompt"], trainer.processing_class)
        if rows["input_ids"].shape[1] >= min_tokens:
            rows = {name: x for name, x in rows.items() if name not in _NOT_THE_MODELS}
            if trainer.model.get_output_embeddings() is None:
                rows["labels"] = torch.linspace(1, -1, len(rows["input_ids"]))
            found: dict[str, Any] = Trainer._prepare_inputs(trainer, rows)
            return found
    raise ValueError(
        f"no training sample has {min_tokens} tokens to check gradients with: write chunk_check: false"
    )


def _prompt_rows(prompt: Any, tokenizer: Any) -> dict[str, Any]:
    if isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
    else:
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
    return {"input_ids": torch.tensor([ids])}
