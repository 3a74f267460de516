"""Packages that options need; a FlashAttention that chunks do not call is not missed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.training_args import OptimizerNames

from chunkdist.train.build import build_trainer
from chunkdist.train.options import needed_packages
from chunkdist.train.options.arguments import parse_options
from chunkdist.train.options.needed_packages import check_packages, usable_attention
from tests.helpers.tiny_run import TEXTS, command_line

OF_TORCH = {"adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"}


@pytest.mark.parametrize("optimizer", list(OptimizerNames), ids=lambda name: name.value)
def test_every_optimizer_that_is_not_torchs_needs_a_package(
    optimizer: OptimizerNames, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of transformers 5.23: a new one must be looked at."""
    given: Any = SimpleNamespace(optim=optimizer, optim_target_modules=["q_proj"], report_to=[])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    if optimizer.value in OF_TORCH:
        check_packages(given)
        return
    with pytest.raises(ValueError, match=f"optim={optimizer.value} needs .*: pip install"):
        check_packages(given)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    check_packages(given)


def test_low_rank_optimizers_need_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    given: Any = SimpleNamespace(optim=OptimizerNames.GALORE_ADAMW, optim_target_modules=None, report_to=[])
    with pytest.raises(ValueError, match="optim=galore_adamw needs optim_target_modules"):
        check_packages(given)


def test_a_tracker_of_another_package_name(monkeypatch: pytest.MonkeyPatch) -> None:
    given: Any = SimpleNamespace(
        optim=OptimizerNames.SGD, optim_target_modules=None, report_to=["tensorboard"]
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "tensorboardX" or None)
    check_packages(given)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="report_to=tensorboard needs tensorboard"):
        check_packages(given)


@pytest.fixture
def no_flash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needed_packages, "_FLASH", {"flash_attention_2": (lambda: False, "flash-attn")})


def test_what_a_model_is_loaded_with(no_flash: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert usable_attention("sdpa", is_chunked=False) == ("sdpa", None)
    assert usable_attention(None, is_chunked=True) == (None, None)
    name, line = usable_attention("flash_attention_2", is_chunked=True)
    assert name is None
    assert line is not None
    assert "flash-attn is not usable here; chunks have kernels of their own" in line
    with pytest.raises(ValueError, match="with chunk_method=none needs flash-attn"):
        usable_attention("flash_attention_2", is_chunked=False)
    monkeypatch.setattr(needed_packages, "_FLASH", {"flash_attention_2": (lambda: True, "flash-attn")})
    assert usable_attention("flash_attention_2", is_chunked=False) == ("flash_attention_2", None)


def test_a_chunked_model_is_built_without_the_package(
    no_flash: None, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_model)).save_pretrained(
        tiny_model.parent / "weights"
    )
    for values in (
        {"attn_implementation": "flash_attention_2"},
        {"model_init_kwargs": '{"attn_implementation": "flash_attention_2"}', "from_scratch": False},
    ):
        if not values.get("from_scratch", True):
            (tiny_model.parent / "weights" / "model.safetensors").rename(tiny_model / "model.safetensors")
        trainer, _ = build_trainer(parse_options(command_line(tiny_model, TEXTS[:1], **values)))
        assert trainer.model.config._attn_implementation == "sdpa"
    assert "attn_implementation=flash_attention_2: flash-attn is not usable here" in capsys.readouterr().out
