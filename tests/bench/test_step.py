"""The benchmarks run, in their smallest size, and write what docs are made of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from chunkdist.bench import step


def test_smoke(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "step.json"
    assert step.main(["--smoke", "--offload", "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    ways = list(step.ways(16, offload=True))
    assert "chunked, host offload" in ways
    assert result["command"].startswith("python -m chunkdist.bench.step --smoke")
    assert result["versions"]["torch"]
    assert result["hardware"]["cpu"]
    assert list(result["summary"]) == ways
    assert len(result["steps"]) == 2 * len(ways)
    for way in ways:
        row = result["summary"][way]
        assert row["wall_ratio"] > 0
        assert row["cpu_ratio"] > 0
        assert row["largest_gradient_difference"] < 1e-5
        assert way in capsys.readouterr().out or way in step.table(result)
    assert result["summary"][step.BASELINE]["wall_ratio"] == 1


def test_the_order_of_the_ways_rotates(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "step.json"
    step.main(["--smoke", "--repetitions", "3", "--json", str(file)])
    steps = json.loads(file.read_text())["steps"]
    firsts = [next(entry["way"] for entry in steps if entry["round"] == number) for number in (1, 2, 3)]
    assert firsts == list(step.ways(16))[:3]


def test_a_median_of_ratios_within_rounds() -> None:
    def made(number: int, way: str, wall_s: float) -> step.Step:
        return step.Step(
            round=number,
            way=way,
            wall_s=wall_s,
            cpu_s=wall_s,
            peak_allocated_bytes=None,
            peak_reserved_bytes=None,
        )

    other = "other"
    slow_machine = [made(1, step.BASELINE, 1.0), made(2, step.BASELINE, 10.0), made(3, step.BASELINE, 2.0)]
    steps = [*slow_machine, made(3, other, 2.4), made(1, other, 1.1), made(2, other, 9.0)]
    row = step._summary(steps, other)
    assert row["wall_ratio"] == pytest.approx(1.1)
    assert (row["wall_ratio_lowest"], row["wall_ratio_highest"]) == (pytest.approx(0.9), pytest.approx(1.2))
    assert row["median_wall_s"] == 2.4


@pytest.mark.parametrize("arguments", [["--repetitions", "0"], ["--chunk-size", "-1"], ["--num-tokens", "0"]])
def test_counts_are_checked(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        step.main(["--smoke", *arguments])
    assert "write an integer >= 1" in capsys.readouterr().err
