"""What is worse by more than the threshold fails, and nothing else."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from chunkdist.bench import compare

NAN, INF = math.nan, math.inf


def result(**changes: Any) -> dict[str, Any]:
    row = {
        "num_tokens": 64,
        "variant": "chunked",
        "outcome": "ran",
        "median_wall_s": 1.0,
        "wall_ratio": 1.0,
        "mfu": 0.5,
        "tokens_per_s": 64.0,
        "peak_allocated_bytes": 100,
        "largest_gradient_difference": 1e-7,
    }
    return {"benchmark": "step", "rows": [{**row, **changes}]}


def of(**figures: Any) -> dict[str, Any]:
    return {"benchmark": "long-tail", "rows": [{"variant": "a", **figures}]}


def test_a_slowdown_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / "old.json", tmp_path / "new.json"]
    files[0].write_text(json.dumps(result()))
    for changes, status in (
        ({}, 0),
        ({"wall_ratio": 1.2}, 1),
        ({"wall_ratio": 0.5}, 0),
        ({"median_wall_s": 9.0, "mfu": 0.1, "tokens_per_s": 1.0}, 0),  # another machine: the ratio is judged
        ({"peak_allocated_bytes": 120}, 1),
        ({"outcome": "out of memory"}, 1),
        ({"wall_ratio": NAN}, 1),
        ({"wall_ratio": None}, 1),
        ({"largest_gradient_difference": 4e-7}, 0),  # rounding
        ({"largest_gradient_difference": 1e-4}, 1),
        ({"largest_gradient_difference": NAN}, 1),
        ({"passed": False}, 1),
    ):
        files[1].write_text(json.dumps(result(**changes)))
        assert compare.main(list(map(str, files))) == status, changes
        out = capsys.readouterr().out
        assert ("WORSE" in out) == bool(status)
        assert ("better" in out) == (changes == {"wall_ratio": 0.5})


def test_what_is_gone_or_does_not_end_is_worse() -> None:
    (row,) = result()["rows"]
    two = {**result(), "rows": [row, {**row, "variant": "other"}]}
    (gone,) = (change for change in compare.moved(two, result()) if change["worse"] > 1)
    assert gone == {"row": "64, other", "figure": "row", "worse": INF}
    assert {change["worse"] for change in compare.moved(result(), two)} == {1}, "a new row is no news"
    assert INF in [change["worse"] for change in compare.moved(result(), {**result(), "partial": True})]
    failed = result(outcome="out of memory")
    assert compare.moved(failed, result())[0]["worse"] == 0, "it runs now"


def test_no_number_is_worse_than_any_and_any_is_better_than_none() -> None:
    good, bad = of(out_error=1.0), of(out_error=NAN)
    found = [compare.moved(*pair)[0]["worse"] for pair in ((good, bad), (bad, bad), (bad, good))]
    assert found == [INF, INF, 0]


def test_more_is_better_of_rates_and_less_of_seconds() -> None:
    for figure in ("mfu", "tokens_per_s", "wall_speedup", "cpu_speedup", "fits"):
        old, new = of(**{figure: 4.0}), of(**{figure: 2.0})
        assert compare.moved(old, new)[0]["worse"] == pytest.approx(2), figure
        assert compare.moved(new, old)[0]["worse"] == pytest.approx(0.5), figure
    assert compare.moved(of(forward_s=1.0), of(forward_s=3.0))[0]["worse"] == pytest.approx(3)
    slow = of(wall_speedup=2.0, median_wall_s=9.0, median_cpu_s=9.0)
    fast = of(wall_speedup=2.0, median_wall_s=1.0, median_cpu_s=1.0)
    assert [change["figure"] for change in compare.moved(fast, slow)] == ["wall_speedup"], "of one machine"


def test_what_cannot_be_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="differ in benchmark: step and long-tail"):
        compare.moved(result(), of(mfu=1.0))
    with pytest.raises(ValueError, match="no row in common"):
        compare.moved(result(), result(variant="other"))
    with pytest.raises(ValueError, match="no figure that is judged in common"):
        compare.moved(of(plan="a"), of(plan="a"))
    old, new = {"num_layers": 4, "new": 1}, {"num_layers": 8}
    with pytest.raises(ValueError, match="differ in num_layers: 4 and 8"):
        compare.moved({**result(), "model": old}, {**result(), "model": new})
    with pytest.raises(ValueError, match="differ in baseline: a and b"):
        compare.moved({**result(), "baseline": "a"}, {**result(), "baseline": "b"})
    for given, said in (
        ([str(tmp_path / "no.json")] * 2, "cannot be compared"),
        (["a", "b", "--threshold", "0.9"], "write 1 or more"),
    ):
        with pytest.raises(SystemExit):
            compare.main(given)
        assert said in capsys.readouterr().err
