"""The memory benchmark of hybrid models runs, in its smallest size, and docs/memory.md has its figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from chunkdist.bench import hybrid_memory

ROOT = Path(__file__).parents[2]


def test_smoke(tmp_path: Path) -> None:
    file = tmp_path / "memory.json"
    assert hybrid_memory.main(["--smoke", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["summary"].values()
    assert [row["place"] for row in rows] == ["a layer with state", *["an attention layer"] * 2]
    assert all(abs(row["formula_bytes"] / row["peak_bytes"] - 1) < 0.05 for row in rows)


def test_layers_that_do_not_add_up_are_not_extrapolated(monkeypatch: pytest.MonkeyPatch) -> None:
    def peaks_of(sizes: Any, chunk_size: int, num_layers: int, num_tokens: int) -> Any:
        def peak(place: str) -> int:
            starts = num_tokens // chunk_size - 1
            return hybrid_memory.growing_bytes(
                place, sizes, num_layers=2, num_tokens=num_tokens, state_bytes=1, num_starts=starts
            )

        return {place: peak(place) for place in hybrid_memory.PLACES}, 1

    monkeypatch.setattr(hybrid_memory, "peaks_of", peaks_of)
    with pytest.raises(RuntimeError, match="a layer more does not add"):
        hybrid_memory.main(["--smoke"])


def test_the_formula_is_within_5_percent() -> None:
    result = json.loads((ROOT / "docs" / "benchmarks" / "hybrid-memory.json").read_text())
    assert list(result["summary"]) == [str(2**power) for power in range(14, 19)]
    for row in result["summary"].values():
        assert row["formula_bytes"] == pytest.approx(row["peak_bytes"], rel=0.05)
    assert hybrid_memory.table(result) in (ROOT / "docs" / "memory.md").read_text()
