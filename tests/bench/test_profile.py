"""The profile tells which operators take the time, and how much of the step none runs."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from chunkdist.bench import profile
from chunkdist.bench.options import parser_of
from chunkdist.bench.report import Run


def test_a_pause_of_the_host_is_no_kernel(tmp_path: Path) -> None:
    a = torch.randn(64, 64)

    def step() -> None:
        for _ in range(3):
            torch.relu(a @ a)
        time.sleep(0.2)

    run = Run(parser_of("profile", ""), [])
    profile.measure(step, run, tmp_path / "trace.json", 2)
    assert run.result["kernel_share"] < 0.9
    assert run.result["profiled_s"] >= 0.2
    assert len(run.rows) == 2
    rows = {row["kernel"]: row["count"] for row in run.rows}
    assert set(rows.values()) == {3}
    assert "aten::mm" in rows
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


def test_bad_options(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        profile.main(["--smoke", "--trace", str(tmp_path / "no" / "trace.json")])
    assert "make it first" in capsys.readouterr().err
