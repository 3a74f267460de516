"""`chunkdist doctor` says what is wrong with a machine, and how it ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from chunkdist.attention.cpu_flash import CpuFlashBackend
from chunkdist.cli.main import main


def findings(file: Path) -> dict[str, dict[str, str]]:
    told = json.loads(file.read_text())
    assert told["environment"]["torch"] == torch.__version__
    return {finding["what"]: finding for finding in told["findings"]}


def test_nothing_is_wrong_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json", str(tmp_path / "found.json")]) == 0
    found = findings(tmp_path / "found.json")
    assert not any(finding["to_do"] for finding in found.values())
    assert "cases, off by" in found["cpu_flash, float32"]["found"]
    assert "8 cases" in found["math, float32"]["found"]
    assert "in the wider dtype" in found["gradients"]["found"]
    out = capsys.readouterr().out
    assert "nothing is wrong" in out
    assert "WRONG" not in out


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_a_wrong_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], factor: float
) -> None:
    real = CpuFlashBackend.backward

    def backward(self: CpuFlashBackend, *args: Any) -> torch.Tensor:
        return real(self, *args) * factor

    monkeypatch.setattr(CpuFlashBackend, "backward", backward)
    assert main(["doctor", "--json", str(tmp_path / "found.json")]) == 1
    found = findings(tmp_path / "found.json")
    assert "write attention: math" in found["cpu_flash, float32"]["to_do"]
    assert not found["math, float32"]["to_do"]
    out = capsys.readouterr().out
    assert "WRONG" in out
    assert "cpu_flash, float32: wrong results on this machine" in out


def test_a_gpu_that_fails_ends_the_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(device: torch.device) -> None:
        raise RuntimeError("the first kernel failed: another process has it")

    monkeypatch.setattr("chunkdist.cli.doctor.try_first_kernel", fail)
    monkeypatch.setattr("chunkdist.cli.doctor.why_gpu_is_idle", lambda: "an idle GPU: install another wheel")
    assert main(["doctor", "--json", str(tmp_path / "found.json")]) == 1
    found = findings(tmp_path / "found.json")
    assert list(found) == ["driver and wheel", "first kernel"]
    assert "install another wheel" in found["driver and wheel"]["to_do"]
    assert "another process has it" in found["first kernel"]["to_do"]


def test_takes_no_other_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--all"]) == 2
    assert "'--all'" in capsys.readouterr().err
