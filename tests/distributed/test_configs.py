"""Every file of configs/ trains a tiny model for a step, under the engine that its first lines name."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.distributed.launched import arguments_of, figures, save_initial_model, train
from tests.distributed.ranks import Ranks
from tests.helpers.tiny_run import ROOT, TEXTS, load_script, make_model_folder
from tests.launchers.test_other_trainers import options_of

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")

CONFIGS = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / "configs").glob("*.yaml")}
ENGINES: dict[str, list[tuple[str, int]]] = {
    "llama3-8b-full-24gb": [("fsdp2-offload", 1), ("zero3-one-card", 1)],
    "llama3-70b-lora-24gb": [("fsdp2-offload", 1)],
    "llama3-8b-1m-8gpu": [("fsdp2", 2), ("zero3", 2)],
}
"""Engines and their ranks; the others run in one process without. A pipeline has its own launches:
tests/pipeline/test_launch_pipeline.py."""
KINDS = ("dpo", "reward", "grpo")
TINY: dict[str, Any] = {
    "max_length": 64,
    "chunk_size": 16,
    "max_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "long_samples": "split",
}
ALONE = sorted(name for name in CONFIGS if name not in ENGINES and not re.search("quickstart|pipeline", name))


@pytest.fixture(scope="module")
def one_rank() -> Iterator[Ranks]:
    ranks = Ranks(1, timeout_s=600)  # DeepSpeed compiles its CPU Adam where that has not been done
    yield ranks
    ranks.stop()


def settings(name: str) -> dict[str, Any]:
    """Options that make a config tiny."""
    config, changed = CONFIGS[name], dict(TINY)
    if config.get("sequence_parallel_size"):
        changed["sequence_parallel_size"] = 2
    return {**changed, "bf16": config["bf16"]}


def tiny(name: str, folder: Path) -> Path:
    """The config in `folder`, without what bitsandbytes would do where it is not installed; and the model."""
    has_bitsandbytes = importlib.util.find_spec("bitsandbytes") is not None
    lost = set() if has_bitsandbytes else {"load_in_4bit", "use_bnb_nested_quant"}
    kept = {key: value for key, value in CONFIGS[name].items() if key not in lost}
    if not has_bitsandbytes and "8bit" in kept.get("optim", ""):
        kept["optim"] = "adamw_torch"
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(kept))
    make_model_folder(folder / "model", num_hidden_layers=4)
    if kept.get("use_peft"):
        save_initial_model(folder / "model")
    return path


@pytest.mark.parametrize(
    ("name", "engine", "num_ranks"), [(name, *run) for name, runs in ENGINES.items() for run in runs]
)
def test_a_config_trains_under_its_engine(
    one_rank: Ranks, two_ranks: Ranks, tmp_path: Path, name: str, engine: str, num_ranks: int
) -> None:
    values = {"config": tiny(name, tmp_path), **settings(name)}
    more = []
    if engine == "zero3-one-card":
        if not os.environ.get("CHUNKDIST_TEST_CPU_ADAM"):
            pytest.skip("DeepSpeed compiles its CPU Adam, for minutes: set CHUNKDIST_TEST_CPU_ADAM=1")
        values |= of_comment(name, engine)
        more = ["--use_cpu", "true"]
    ranks = one_rank if num_ranks == 1 else two_ranks
    _, arguments = arguments_of(engine, tmp_path, TEXTS * 4, **values)
    assert ranks.run(train, engine, [*arguments, *more]) == [0] * num_ranks
    assert list(figures(tmp_path, "loss")) == [1]


def of_comment(name: str, preset: str) -> dict[str, str]:
    """The options that a config's first lines add on the command line for a preset."""
    text = (ROOT / "configs" / f"{name}.yaml").read_text()
    (told,) = re.findall(rf"--deepspeed configs/deepspeed/{preset}\.json (--.*)", text)
    return dict(re.findall(r"--(\w+) (\S+)", told))


@pytest.mark.parametrize("name", ALONE)
def test_a_config_trains_in_one_process(tmp_path: Path, name: str) -> None:
    kind = next((kind for kind in KINDS if kind in name), None)
    if kind is None:
        given = {"config": tiny(name, tmp_path), **settings(name)}
        _, arguments = arguments_of("single", tmp_path, TEXTS * 4, **given)
    else:
        given = {"config": ROOT / "configs" / f"{name}.yaml", **settings(name)}
        given.pop("long_samples")
        given |= {"max_steps": 1, "chunk_size": 16, "gradient_accumulation_steps": 1}
        given |= {"max_length": None, "num_generations": 2} if kind == "grpo" else {"max_length": 128}
        arguments = options_of(tmp_path, kind, **given)
    launcher = load_script(ROOT / "launchers" / f"{kind or 'train'}.py")
    assert launcher.main([*arguments, "--use_cpu", "true"]) == 0
