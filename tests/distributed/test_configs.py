"""Every file of configs/ trains a tiny model for a step, under the engine that its first lines name."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.distributed.launched import arguments_of, figures, train
from tests.distributed.ranks import Ranks
from tests.helpers.tiny_run import ROOT, TEXTS, load_script, make_model_folder
from tests.launchers.test_other_trainers import options_of

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")

CONFIGS = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / "configs").glob("*.yaml")}
ENGINES: dict[str, list[tuple[str, int]]] = {
    "llama3-8b-full-24gb": [("fsdp2-offload", 1), ("zero3-one-card", 1)],
    "llama3-70b-lora-24gb": [("fsdp2-offload", 1)],
    "llama3-8b-1m-8gpu": [("fsdp2", 2), ("zero3", 2)],
    "llama3-8b-pipeline": [("ddp", 2)],
}
"""Engines and their ranks; the others run in one process without."""
KINDS = ("dpo", "reward", "grpo")
TINY: dict[str, Any] = {
    "max_length": 64,
    "chunk_size": 16,
    "max_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "long_samples": "split",
}
ALONE = sorted(name for name in CONFIGS if name not in ENGINES and "quickstart" not in name)


@pytest.fixture(scope="module")
def one_rank() -> Iterator[Ranks]:
    ranks = Ranks(1)
    yield ranks
    ranks.stop()


def settings(name: str) -> dict[str, Any]:
    """Options that make a config tiny. bitsandbytes need not be there; its options are then left out."""
    config, changed = CONFIGS[name], dict(TINY)
    if config.get("sequence_parallel_size"):
        changed["sequence_parallel_size"] = 2
    if config.get("pipeline_stages"):
        changed |= {"pipeline_stages": 2, "pipeline_shard_weights": False, "per_device_train_batch_size": 2}
    if importlib.util.find_spec("bitsandbytes") is None:
        if config.get("load_in_4bit"):
            changed |= {"load_in_4bit": False, "use_bnb_nested_quant": False}
        if "8bit" in config.get("optim", ""):
            changed["optim"] = "adamw_torch"
    return {**changed, "bf16": config["bf16"]}


@pytest.mark.parametrize(
    ("name", "engine", "num_ranks"), [(name, *run) for name, runs in ENGINES.items() for run in runs]
)
def test_a_config_trains_under_its_engine(
    one_rank: Ranks, two_ranks: Ranks, tmp_path: Path, name: str, engine: str, num_ranks: int
) -> None:
    make_model_folder(tmp_path / "model")
    values = settings(name)
    if engine == "zero3-one-card":
        pytest.importorskip("cpuinfo")
        values |= of_comment(name, "zero3-one-card")
    given = {"config": ROOT / "configs" / f"{name}.yaml", **values}
    ranks = one_rank if num_ranks == 1 else two_ranks
    assert ranks.run(train, *arguments_of(engine, tmp_path, TEXTS * 4, **given)) == [0] * num_ranks
    assert list(figures(tmp_path, "loss")) == [1]


def of_comment(name: str, preset: str) -> dict[str, str]:
    """The options that a config's first lines add on the command line for a preset."""
    text = (ROOT / "configs" / f"{name}.yaml").read_text()
    (told,) = re.findall(rf"--deepspeed configs/deepspeed/{preset}\.json (--.*)", text)
    return dict(re.findall(r"--(\w+) (\S+)", told))


@pytest.mark.parametrize("name", ALONE)
def test_a_config_trains_in_one_process(tmp_path: Path, name: str) -> None:
    kind = next((kind for kind in KINDS if kind in name), None)
    given = {"config": ROOT / "configs" / f"{name}.yaml", **settings(name)}
    if kind is None:
        make_model_folder(tmp_path / "model")
        _, arguments = arguments_of("single", tmp_path, TEXTS * 4, **given)
    else:
        given.pop("long_samples")
        given |= {"max_steps": 1, "chunk_size": 16, "gradient_accumulation_steps": 1}
        given |= {"max_length": None, "num_generations": 2} if kind == "grpo" else {"max_length": 128}
        arguments = options_of(tmp_path, kind, **given)
    launcher = load_script(ROOT / "launchers" / f"{kind or 'train'}.py")
    assert launcher.main([*arguments, "--use_cpu", "true"]) == 0
