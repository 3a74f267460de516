"""The launcher refuses sequence and context parallelism in one line, before a model is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.tiny_run import command_line, load_script
from tests.launchers.test_train import FITTING, LAUNCHER, fault


@pytest.fixture(scope="module")
def launcher() -> Any:
    return load_script(LAUNCHER)


@pytest.mark.parametrize("name", ["cp_size", "sp_size"])
def test_in_the_config_file(
    name: str, launcher: Any, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump({"parallelism_config": {name: 2}}))
    line = fault(launcher, capsys, ["--config", str(config), *command_line(tiny_model, FITTING)])
    assert f"{name}=2 in parallelism_config" in line
    assert f"write {name}: 1" in line
    assert not (tiny_model.parent / "out").exists()


def test_in_the_environment_of_accelerate_launch(
    launcher: Any, tiny_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `accelerate launch` makes it of `parallelism_config` in its config file."""
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv("PARALLELISM_CONFIG_CP_SIZE", "2")
    assert "cp_size=2" in fault(launcher, capsys, command_line(tiny_model, FITTING))


def test_in_the_deepspeed_config(
    launcher: Any, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "zero2.json"
    config.write_text(
        '{"zero_optimization": {"stage": 2}, "sequence_parallel_size": 2, "data_parallel_size": 1, '
        '"train_micro_batch_size_per_gpu": "auto"}'
    )
    line = fault(launcher, capsys, command_line(tiny_model, FITTING, deepspeed=config))
    assert "sequence_parallel_size=2 in the DeepSpeed config" in line
