"""Ratios of SpaCO's steps are medians over rounds that have all parts."""

from __future__ import annotations

import pytest

from chunkdist.bench import spaco
from chunkdist.bench.spaco import EXACT, FORWARD


def test_planted_seconds() -> None:
    """Three rounds, of which the last has not ended; the machine was slow in the second."""
    seconds = {FORWARD: [1.0, 10.0, 1.0], EXACT: [4.0, 40.0, 4.0], "2 chunks": [2.0, 30.0]}
    shares = {FORWARD: 0.0, EXACT: 0.0, "2 chunks": 0.25}
    rows = {row["variant"]: row for row in spaco.rows_of(seconds, [2.0, 20.0], shares)}
    assert rows[EXACT] == {"variant": EXACT, "median_wall_s": 4.0, "wall_s": [4.0, 40.0, 4.0]}
    row = rows["2 chunks"]
    assert row["of_exact"] == pytest.approx((2 / 4 + 30 / 40) / 2)
    assert row["of_forward"] == pytest.approx((2 / 1 + 30 / 10) / 2)
    assert row["of_parts"] == pytest.approx((2 / 1.5 + 30 / 15) / 2)
    assert row["faster_than_exact"] == pytest.approx((4 / 2 + 40 / 30) / 2)
    assert spaco.rows_of({FORWARD: [1.0], EXACT: [], "2 chunks": []}, [], shares) == [
        {"variant": FORWARD, "median_wall_s": 1.0, "wall_s": [1.0]}
    ]


def test_bad_sizes() -> None:
    for given in (["--num-tokens", "100"], ["--budgets", "0"], ["--budgets", "17"], ["--repetitions", "0"]):
        with pytest.raises(SystemExit):
            spaco.main(["--smoke", *given])
