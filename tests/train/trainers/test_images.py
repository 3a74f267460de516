"""TRL's `SFTTrainer` with images: losses and weights after three steps are those of the unchunked trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from chunkdist import ChunkConfig, chunk_model
from tests.helpers.image_zoo import image_rows, tiny_image_model
from tests.helpers.tiny_run import BYTE_LLAMA

LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")


def trained(folder: Path, name: str, config: ChunkConfig | None, **options: Any) -> tuple[list[float], Any]:
    torch.manual_seed(0)
    model = tiny_image_model(name).float()
    batches = [image_rows(model) for _ in range(3)]
    batches = [{key: _in_fp32(x) for key, x in batch.items()} for batch in batches]
    if options.pop("frozen_tower", False):
        model.model.vision_model.requires_grad_(False)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(folder),
            max_steps=3,
            per_device_train_batch_size=1,
            optim="sgd",  # Adam makes much of gradients that are zero but for rounding
            learning_rate=1e-1,
            lr_scheduler_type="constant",
            logging_steps=1,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
            remove_unused_columns=False,
            train_sampling_strategy="sequential",
            dataset_kwargs={"skip_prepare_dataset": True},
        ),
        train_dataset=Dataset.from_dict({"batch": [0, 1, 2]}),
        data_collator=lambda rows: batches[rows[0]["batch"]],
        processing_class=AutoTokenizer.from_pretrained(BYTE_LLAMA),
        **options,
    )
    if config is not None:
        chunk_model(trainer.model, config)
    trainer.train()
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    return losses, {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}


def _in_fp32(x: Tensor) -> Tensor:
    return x.float() if x.is_floating_point() else x


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("SmolVLMForConditionalGeneration", {}),
        ("SmolVLMForConditionalGeneration", {"frozen_tower": True}),
        ("Qwen3VLForConditionalGeneration", {}),
        ("Qwen3VLForConditionalGeneration", {"peft_config": LORA}),
    ],
    ids=lambda x: x if isinstance(x, str) else "-".join(x) or "full",
)
def test_three_steps(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    losses, expected = trained(tmp_path, name, None, **options)
    found_losses, found = trained(tmp_path, name, ChunkConfig(chunk_size=7), **options)
    assert found_losses == pytest.approx(losses, rel=1e-5)
    assert len(set(losses)) == 3
    for key, x in expected.items():
        assert (found[key] - x).norm() <= 1e-5 * x.norm() + 1e-6, key
