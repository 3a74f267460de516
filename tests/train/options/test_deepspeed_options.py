"""DeepSpeed's config and Accelerate's settings against the options of the run; bad files are in
tests/launchers/test_bad_options.py."""

from __future__ import annotations

import base64
import json
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

from chunkdist.train.options.deepspeed_options import check_at_odds, check_deepspeed
from tests.helpers.tiny_run import ROOT

PRESETS = sorted((ROOT / "configs" / "deepspeed").glob("*.json"))


def arguments(**values: Any) -> Any:
    """As much of transformers' `TrainingArguments` as its DeepSpeed config is compared with."""
    given = {
        "world_size": 2,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 4,
        "max_grad_norm": 1.0,
        "learning_rate": 1e-4,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "weight_decay": 0.0,
        "bf16": True,
        "fp16": False,
        "bf16_full_eval": False,
        "fp16_full_eval": False,
        "save_on_each_node": False,
        **values,
    }
    return SimpleNamespace(**given)


def check(config: dict[str, Any], **values: Any) -> None:
    training = arguments(**values)
    training.hf_deepspeed_config = HfTrainerDeepSpeedConfig(config)
    training.hf_deepspeed_config.trainer_config_process(training)
    check_at_odds(training)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (
            {"train_micro_batch_size_per_gpu": 2},
            "train_micro_batch_size_per_gpu=2 against per_device_train_batch",
        ),
        (
            {"gradient_accumulation_steps": 8},
            "gradient_accumulation_steps=8 against gradient_accumulation_steps=4",
        ),
        ({"train_batch_size": 7}, "train_batch_size=7"),
        ({"gradient_clipping": 0.5}, "gradient_clipping=0.5 against max_grad_norm=1.0"),
        ({"bf16": {"enabled": False}}, "bf16.enabled=False"),
        ({"fp16": {"enabled": True}}, "fp16.enabled=True"),
        ({"optimizer": {"params": {"lr": 1}}}, "optimizer.params.lr=1"),
    ],
)
def test_a_config_at_odds_with_the_options(config: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=r'deepspeed.s config is at odds .*: write "auto"') as caught:
        check(config)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 4, "bf16": {"enabled": True}},
        *(json.loads(path.read_text()) for path in PRESETS),
    ],
)
def test_auto_and_equal_values_are_not_at_odds(config: dict[str, Any]) -> None:
    check(config)


@pytest.mark.parametrize("asked", ["fp16", "fp8"])
def test_accelerates_mixed_precision(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", asked)
    with pytest.raises(
        ValueError, match=f"mixed_precision: {asked} in Accelerate's config is at odds with bf16=True"
    ):
        check_at_odds(arguments())
    for same in ("bf16", "no"):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", same)
        check_at_odds(arguments())


def read(deepspeed: Any, fsdp: Any = None) -> None:
    check_deepspeed(Namespace(deepspeed=deepspeed, fsdp=fsdp))


def test_what_a_launcher_passes_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    for path in PRESETS:
        read(str(path))
        read(json.loads(path.read_text()))
        read(path.read_text())
        read(base64.urlsafe_b64encode(path.read_bytes()).decode())
    with pytest.raises(ValueError, match="deepspeed and fsdp='full_shard' are both set"):
        read(str(PRESETS[0]), fsdp="full_shard")
    monkeypatch.delenv("LOCAL_RANK")
    with pytest.raises(ValueError, match="no launcher has started this process: start it with `deepspeed"):
        read(str(PRESETS[0]))
