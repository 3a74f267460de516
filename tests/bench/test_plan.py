"""The planner's benchmark runs, in its smallest size, and docs/memory.md has its figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from chunkdist.bench import plan
from tests.helpers.tiny_run import load_script

ROOT = Path(__file__).parents[2]


def test_smoke(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    assert plan.main(["--smoke", "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    rows = result["summary"]["tiny"]["lengths"]
    assert list(rows) == ["512", "2048"]
    for row in [*rows.values(), *result["targets"], *result["engines"]]:
        assert row["formula_step_bytes"] == pytest.approx(row["simulated_step_bytes"], rel=0.05)


def test_the_formula_is_within_5_percent() -> None:
    result = json.loads((ROOT / "docs" / "benchmarks" / "plan.json").read_text())
    rows = [row for found in result["summary"].values() for row in found["lengths"].values()]
    assert len(rows) == 20
    for row in [*rows, *result["targets"], *result["engines"]]:
        assert row["formula_step_bytes"] == pytest.approx(row["simulated_step_bytes"], rel=0.05)
    device, host, alone = result["targets"]
    assert device["num_tokens"] == 131072
    assert device["peak_bytes"] <= 23 * 2**30
    assert device["peak_bytes"] - device["weight_bytes"] <= 48 * 2**10 * device["num_tokens"]
    assert host["num_tokens"] == 65536
    assert host["host_bytes"] <= 16 * 2**30
    assert (alone["num_tokens"], alone["host_bytes"]) == (32768, 0)
    assert alone["peak_bytes"] <= 23 * 2**30
    page = (ROOT / "docs" / "memory.md").read_text()
    assert load_script(ROOT / "docs" / "make_memory_tables.py").page_with_table(page, result) == page
