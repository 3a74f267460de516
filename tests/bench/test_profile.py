"""The profile's trace can be opened, and its gaps are those that are there."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from chunkdist.bench import profile
from chunkdist.bench.profile import Gap, Kernel
from chunkdist.bench.timing import Cost


def test_smoke(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, trace = tmp_path / "profile.json", tmp_path / "trace.json"
    assert profile.main(["--smoke", "--json", str(file), "--trace", str(trace)]) == 0
    events = json.loads(trace.read_text())["traceEvents"]
    assert any(event.get("name") == "aten::mm" for event in events)
    result = json.loads(file.read_text())
    assert 0 < result["kernel_s"] < result["profiled_s"]
    assert 0 < result["kernel_share_profiled"] < 1
    seconds = sum(row["seconds"] for row in result["gaps"])
    assert result["kernel_s"] + seconds == pytest.approx(result["profiled_s"], rel=0.3)
    out = capsys.readouterr().out
    assert all(row["name"] in out for row in result["top"])
    assert str(trace) in out


def kernel(name: str, start: float, end: float) -> Kernel:
    return Kernel(name=name, start_s=start, end_s=end)


def test_gaps_between_kernels_of_several_streams() -> None:
    """b runs beside a and longer, c inside b; nothing runs from 5 to 7."""
    kernels = [kernel("a", 0, 3), kernel("b", 2, 5), kernel("c", 3, 4), kernel("d", 7, 8), kernel("e", 8, 9)]
    assert profile.gaps_of(kernels) == (7, [Gap(seconds=2, before="b", after="d")])
    assert [k.name for k in profile.outermost(kernels)] == ["a", "b", "d", "e"]


def test_an_impossible_share_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that the profiler has made slower than the step without it, on two streams at once: what runs
    at the same time is counted once, and what is left above 1 is shown."""
    found = [kernel("a", 0, 3), kernel("b", 0, 3), kernel("c", 2, 4)]
    monkeypatch.setattr(profile, "kernels_of", lambda *args, **kwargs: found)
    monkeypatch.setattr(profile, "outermost", lambda kernels: kernels)
    monkeypatch.setattr(profile, "cost_of", lambda *args, **kwargs: Cost(wall_s=2.0, cpu_s=2.0))
    monkeypatch.setattr(profile, "seconds_of", lambda step, **kwargs: (step(), (5.0, 5.0))[1])
    result = profile.measure(lambda: None, on_gpu=False, trace=tmp_path / "trace.json", num_kernels=3)
    assert (result["kernel_s"], result["kernel_share"], result["kernel_share_profiled"]) == (4, 2.0, 0.8)


def test_operators_are_not_recorded_on_a_gpu() -> None:
    assert [activity.name for activity in profile.recorded(on_gpu=True)] == ["CUDA"]
    assert [activity.name for activity in profile.recorded(on_gpu=False)] == ["CPU"]


def test_gaps_by_length() -> None:
    gaps = [Gap(seconds=seconds, before="", after="") for seconds in (10e-6, 11e-6, 50e-6, 20e-3)]
    rows = profile.by_length(gaps)
    assert [row["count"] for row in rows] == [1, 2, 0, 0, 1]
    assert rows[1]["seconds"] == pytest.approx(61e-6)


def test_a_pause_of_the_host_is_found(tmp_path: Path) -> None:
    a = torch.randn(64, 64)

    def step() -> None:
        torch.relu(a @ a)
        time.sleep(0.05)
        torch.sigmoid(a)

    found = profile.measure(step, on_gpu=False, trace=tmp_path / "trace.json.gz", num_kernels=2)
    longest = found["longest_gaps"][0]
    assert (longest["before"], longest["after"]) == ("aten::relu", "aten::sigmoid")
    assert 0.05 <= longest["seconds"] < found["profiled_s"]
    assert found["gaps"][-1]["count"] == 1
    assert found["kernel_share"] < 0.5
    assert len(found["top"]) == 2
    assert (tmp_path / "trace.json.gz").stat().st_size > 0


def test_bad_options(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        profile.main(["--smoke", "--trace", str(tmp_path / "no" / "trace.json")])
    assert "make it first" in capsys.readouterr().err
