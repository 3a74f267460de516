"""The planner's benchmark runs, in its smallest size, and docs/memory.md has its figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from chunkdist.bench import plan
from tests.tiny_run import load_script

ROOT = Path(__file__).parents[2]


def test_smoke(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    assert plan.main(["--smoke", "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    rows = result["summary"]["tiny"]["lengths"]
    assert list(rows) == ["512", "2048"]
    for row in rows.values():
        assert row["formula_step_bytes"] == pytest.approx(row["simulated_step_bytes"], rel=0.05)


def test_the_formula_is_within_5_percent() -> None:
    result = json.loads((ROOT / "docs" / "benchmarks" / "plan.json").read_text())
    rows = [row for found in result["summary"].values() for row in found["lengths"].values()]
    counted = [row for row in rows if row["simulated_step_bytes"] is not None]
    assert counted
    for row in counted:
        assert row["formula_step_bytes"] == pytest.approx(row["simulated_step_bytes"], rel=0.05)
    page = (ROOT / "docs" / "memory.md").read_text()
    assert load_script(ROOT / "docs" / "make_memory_tables.py").page_with_table(page, result) == page
