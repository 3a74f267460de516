"""The balance loss of a mixture of experts, which TRL adds by default, in the launcher's trainers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3MoeConfig

from chunkdist import ChunkConfig
from chunkdist.data.streams import join_sequences
from chunkdist.train.build import build_trainer, chunk_trainer
from chunkdist.train.options.arguments import parse_options
from chunkdist.train.trainers.pipeline import PipelineSFTTrainer
from tests.helpers.tiny_run import command_line, make_model_folder
from tests.train.test_trl_loss import figures_of

ROWS = [
    {"input_ids": [(7 * n + 3 * i) % 200 for i in range(length)]} for n, length in enumerate((40, 23, 9, 31))
]


def trainer_of(folder: Path, *, coefficient: float = 0.3, **values: Any) -> Any:
    model = folder / "model"
    if not model.exists():
        make_model_folder(model)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "moe_intermediate_size": 8, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 264}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1}
    config = Qwen3MoeConfig(
        **sizes, **experts, router_aux_loss_coef=coefficient, initializer_range=0.2, architectures=None
    )
    config.save_pretrained(model)
    options = {
        "report_to": "none",
        "chunk_check": False,
        "per_device_train_batch_size": 2,
        "from_scratch": True,
        "chunk_size": 16,
        **values,
    }
    trainer, chunk_config = build_trainer(parse_options(command_line(model, ROWS, **options)))
    chunk_trainer(trainer, chunk_config)
    trainer.current_gradient_accumulation_steps = 2
    return trainer


def test_by_default_it_is_trls(tmp_path: Path) -> None:
    """With the coefficient of the model's config: loss, logged figures and gradients."""
    expected = figures_of(trainer_of(tmp_path, chunk_method="none"))
    found = figures_of(trainer_of(tmp_path))
    without = figures_of(trainer_of(tmp_path, router_aux_loss_coef=0))
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert abs(without[0] - expected[0]) > 0.1
    assert "aux_loss" in expected[1]
    assert found[1].keys() == expected[1].keys()
    for name, values in expected[1].items():
        assert found[1][name] == pytest.approx(values, rel=1e-5), name
    for mine, theirs in zip(found[2], expected[2], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-6)


def test_a_coefficient_that_the_user_writes(tmp_path: Path) -> None:
    expected = figures_of(trainer_of(tmp_path, chunk_method="none", router_aux_loss_coef=0.1))
    assert figures_of(trainer_of(tmp_path, router_aux_loss_coef=0.1))[0] == pytest.approx(
        expected[0], rel=1e-5
    )


def test_streams_count_by_their_tokens(tmp_path: Path) -> None:
    """In token streams, a step's balance loss is the mean over its tokens."""
    trainer = trainer_of(
        tmp_path,
        chunk_packing=True,
        max_length=48,
        per_device_train_batch_size=4,
        logging_steps=1,
        max_steps=1,
        learning_rate=0.0,
    )
    model = trainer.model.eval()
    streams = next(iter(trainer.get_train_dataloader()))
    sizes = [stream["input_ids"].shape[1] for stream in streams]
    assert len(set(sizes)) > 1, "streams of one length show nothing"
    gradients: dict[str, torch.Tensor] = {}

    def keep(*_: Any, **__: Any) -> None:
        gradients.update({name: p.grad.clone() for name, p in model.named_parameters()})

    trainer.create_optimizer_and_scheduler(1)
    trainer.optimizer.register_step_pre_hook(keep)
    trainer.args.max_grad_norm = 0.0
    trainer.train()
    model.zero_grad()
    num_items = sum(int((stream["labels"][:, 1:] != -100).sum()) for stream in streams)
    for stream, size in zip(streams, sizes, strict=True):
        output = model(**stream, output_router_logits=True, num_items_in_batch=num_items)
        own = output.loss + output.aux_loss * (0.3 * size / sum(sizes) - model.router_aux_loss_coef)
        own.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, rtol=1e-3, atol=1e-6)


def test_a_stream_that_fills_up_has_none(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, chunk_packing=True, max_length=48)
    trainer.model.train()
    trainer._step_tokens = 40
    with trainer._balance_weighted(0):
        loss = trainer.compute_loss(trainer.model, join_sequences([]), num_items_in_batch=torch.tensor(50))
    assert loss.item() == 0.0
    assert trainer._metrics["train"]["aux_loss"] == [0.0]
    assert trainer.aux_loss_enabled


def test_a_pipeline_refuses_it(tmp_path: Path) -> None:
    plain = trainer_of(tmp_path, chunk_method="none")
    with pytest.raises(ValueError, match=r"balance loss \(router_aux_loss_coef: 0.3\) .*pipeline_stages: 1"):
        PipelineSFTTrainer(
            chunk_config=ChunkConfig(chunk_size=16),
            long_samples="drop",
            model=plain.model,
            args=plain.args,
            train_dataset=plain.train_dataset,
            processing_class=plain.processing_class,
        )
