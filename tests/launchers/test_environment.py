"""What the launcher says of an environment that is at fault: one line, exit status 2."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from chunkdist.train.launch.roll_call import check_launch
from tests.helpers.tiny_run import ROOT, TEXTS, command_line, load_script

TWO = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture(scope="module")
def launcher() -> Any:
    return load_script(ROOT / "launchers" / "train.py")


def line(launcher: Any, capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    assert launcher.main(arguments) == 2
    (said,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("chunkdist: ")]
    return said


def set_all(monkeypatch: pytest.MonkeyPatch, values: dict[str, str]) -> None:
    for name, value in values.items():
        monkeypatch.setenv(name, value)


def test_a_stale_local_rank_silences_nothing(
    launcher: Any, tiny_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert "chunk_size" in line(launcher, capsys, command_line(tiny_model, TEXTS, chunk_size=-1))
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert "chunk_size" in line(launcher, capsys, command_line(tiny_model, TEXTS, chunk_size=-1))


@pytest.mark.parametrize("name", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_CPU"])
def test_what_is_no_boolean_is_one_line(
    launcher: Any,
    tiny_model: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    monkeypatch.setenv(name, "maybe")
    assert f"{name}='maybe': write true or false" in line(launcher, capsys, command_line(tiny_model, TEXTS))
    monkeypatch.setenv(name, "1")  # one place of Accelerate's code takes it for true, the others for false
    if name == "ACCELERATE_USE_CPU":
        check_launch()
    else:
        assert f"{name}='1'" in line(launcher, capsys, command_line(tiny_model, TEXTS))


def test_a_rank_out_of_range_is_one_line(
    launcher: Any, tiny_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_all(monkeypatch, TWO | {"RANK": "5", "LOCAL_RANK": "1"})
    assert "RANK=5 is out of range for WORLD_SIZE=2" in line(
        launcher, capsys, command_line(tiny_model, TEXTS)
    )
    assert not (tiny_model.parent / "out").exists()


def test_peers_that_do_not_come_and_a_port_in_use_are_one_line(
    launcher: Any, tiny_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        port = str(listener.getsockname()[1])
        set_all(monkeypatch, TWO | {"MASTER_PORT": port})
        assert f"MASTER_PORT={port} is in use" in line(launcher, capsys, command_line(tiny_model, TEXTS))
    assert "rank 1 of WORLD_SIZE=2 did not come" in line(
        launcher, capsys, command_line(tiny_model, TEXTS, ddp_timeout=2)
    )
    assert not (tiny_model.parent / "out").exists()


@pytest.mark.parametrize(
    ("capability", "config", "expected"),
    [("8.6", "", True), ("7.5", "", False), ("8.6", "CONFIG=my.yaml", False)],
)
def test_the_quickstart_is_in_bf16_on_a_gpu_that_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capability: str, config: str, expected: bool
) -> None:
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho {capability}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    told = subprocess.run(
        ["make", "-n", "train", *filter(None, [config])], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert ("--bf16 true" in told.stdout) is expected


@pytest.mark.parametrize("name", ["train", "dpo", "reward", "grpo"])
def test_ctrl_c_while_packages_are_imported(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted:
        def find_spec(self, module: str, *_: Any) -> None:
            if module == "chunkdist.train.run":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "chunkdist.train.run", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Interrupted(), *sys.meta_path])
    with pytest.raises(SystemExit) as left:
        load_script(ROOT / "launchers" / f"{name}.py")
    assert left.value.code == 130
    assert (
        capsys.readouterr().err == "chunkdist: stopped by SIGINT: before the first step, nothing was saved\n"
    )
