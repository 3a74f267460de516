"""The memory benchmark runs, in its smallest size; the bound on the real size is
tests/memory/test_step_memory.py."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from chunkdist.bench import memory
from chunkdist.bench.ways import BASELINE


@pytest.mark.slow
def test_smoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some = [dataclasses.replace(way, num_layers_run=(3, 4, 5)) for way in memory.ways(16)[:3]]
    monkeypatch.setattr(memory, "ways", lambda chunk_size: some)
    file = tmp_path / "memory.json"
    assert memory.main(["--smoke", "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    assert list(result["summary"]) == [way.name for way in some]
    assert all(row["bytes_per_token"] > 0 for row in result["summary"].values())
    default = result["summary"]["chunked, K/V rebuilt (default)"]["bytes_per_token"]
    assert default < result["summary"]["chunked, K/V kept"]["bytes_per_token"]
    assert default < result["summary"][BASELINE]["bytes_per_token"]


def test_layers_that_differ_are_not_extrapolated() -> None:
    with pytest.raises(RuntimeError, match="run all of them"):
        memory._check_layers_are_alike(memory.Way(name="x"), {8: 10, 12: 20, 16: 31})


def test_the_peakof_all_layers() -> None:
    assert memory.of_all_layers({8: 10, 12: 18}, 32) == 58


@pytest.mark.parametrize("lengths", [["64"], ["64", "32"]])
def test_lengths_are_checked(lengths: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        memory.main(["--smoke", "--num-tokens", *lengths])
    assert "ascending" in capsys.readouterr().err
