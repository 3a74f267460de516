"""TRL's balance loss of a mixture of experts: refused unless the user has written that it is to be 0."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen3MoeConfig

from chunkdist.train.build import build_trainer
from chunkdist.train.options.arguments import parse_options
from tests.helpers.tiny_run import TEXTS, command_line, make_model_folder


def trainer_of(folder: Path, *, coefficient: float = 0.001, **values: Any) -> Any:
    model = make_model_folder(folder / "model")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "moe_intermediate_size": 8, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 264}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1}
    Qwen3MoeConfig(**sizes, **experts, router_aux_loss_coef=coefficient).save_pretrained(model)
    trainer, _ = build_trainer(parse_options(command_line(model, TEXTS[:2], report_to="none", **values)))
    return trainer


def test_it_is_refused_unless_it_is_written(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"balance loss \(0.001, .*write router_aux_loss_coef: 0 "
    ) as refused:
        trainer_of(tmp_path)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_a_user_who_wants_none(tmp_path: Path) -> None:
    assert not trainer_of(tmp_path, router_aux_loss_coef=0).aux_loss_enabled


def test_a_model_that_wants_none(tmp_path: Path) -> None:
    assert not trainer_of(tmp_path, coefficient=0.0).aux_loss_enabled


def test_without_chunks_it_is_trls(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, chunk_method="none")
    assert trainer.aux_loss_enabled
    assert trainer.router_aux_loss_coef == 0.001
