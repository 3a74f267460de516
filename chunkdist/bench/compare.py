"""What moved between two results of one benchmark; exit status 1 on a slowdown above a threshold.

Rows with the same name are compared; one that is gone is worse, and so is a run that now fails, or a check
that no longer passes. Between machines, and on a busy one, only ratios to a baseline in the same run can be
compared: they are judged where a row has any, else seconds and rates are. So are bytes and errors.
`chunkdist.bench.figures` says which figures are judged.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chunkdist.bench.figures import FIGURES, markdown, row_name

_SMALLEST, _ROUNDING = 1e-12, 1e-5
"""Differences below it are none: no figure is as small, and no error that is more than rounding in fp32."""


def moved(old: dict[str, Any], new: dict[str, Any]) -> list[dict[str, Any]]:
    """Every figure that both have: what it was, is, and by what factor it is worse (below 1: better;
    infinite: what was there is gone, fails or is NaN).

    Raises:
        ValueError: the results are of different benchmarks, models or baselines, or have no row, or no
            figure, in common.
    """
    known = [{k: r.get(k) for k in ("benchmark", "baseline")} | r.get("model", {}) for r in (old, new)]
    for what in known[0].keys() & known[1].keys():
        if known[0][what] != known[1][what]:
            raise ValueError(f"they differ in {what}: {known[0][what]} and {known[1][what]}: compare equals")
    before, after = ({row_name(row): row for row in result.get("rows", [])} for result in (old, new))
    common = [name for name in after if name in before]
    if not common:
        raise ValueError("the results have no row in common: run both with the same options")
    changes = [_lost(name, "row") for name in before if name not in after]
    if old.get("partial") is None and new.get("partial"):
        changes.append(_lost("all", "partial"))
    compared: list[dict[str, Any]] = []
    for name in common:
        was, row = before[name], after[name]
        if row.get("passed") is False and was.get("passed") is not False:
            changes.append(_lost(name, "passed"))
        outcomes = [one.get("outcome", "ran") for one in (was, row)]
        if outcomes[0] != outcomes[1]:
            better = {"row": name, "figure": "outcome", "worse": 0.0}
            changes.append(_lost(name, "outcome") if outcomes[0] == "ran" else better)
            continue
        for figure in _judged(was, row):
            compared += _change(name, figure, was.get(figure), row.get(figure))
    if not (compared or changes):
        raise ValueError("the results have no figure that is judged in common")
    return [*changes, *compared]


def _judged(was: dict[str, Any], row: dict[str, Any]) -> list[str]:
    judged = {key: figure for key, figure in FIGURES.items() if figure.better is not None}
    has_ratio = any(figure.kind == "ratio" and key in was and key in row for key, figure in judged.items())
    return [key for key, figure in judged.items() if not (has_ratio and figure.kind == "absolute")]


def _lost(name: str, figure: str) -> dict[str, Any]:
    return {"row": name, "figure": figure, "worse": math.inf}


def _change(name: str, figure: str, old: Any, new: Any) -> list[dict[str, Any]]:
    if not isinstance(old, int | float):
        return []
    if not isinstance(new, int | float) or math.isnan(new):
        return [_lost(name, figure)]
    least = _ROUNDING if FIGURES[figure].kind == "error" else _SMALLEST
    worse = (new + least) / (old + least)
    if FIGURES[figure].better == "more":
        worse = 1 / worse
    return [{"row": name, "figure": figure, "old": old, "new": new, "worse": 0 if math.isnan(old) else worse}]


def text(changes: Sequence[dict[str, Any]], threshold: float) -> str:
    """What is worse or better by more than the threshold, for people to read."""
    cells = [["", "factor", "figure", "old", "new", "row"]]
    for change in sorted(changes, key=lambda change: -change["worse"]):
        if not 1 / threshold <= change["worse"] <= threshold:
            verdict = "WORSE" if change["worse"] > 1 else "better"
            values = [f"{change[when]:.6g}" if when in change else "-" for when in ("old", "new")]
            cells.append([verdict, f"{change['worse']:.3f}", change["figure"], *values, change["row"]])
    same = f"{len(changes) - len(cells) + 1} of {len(changes)} figures within a factor of {threshold:g}"
    return same if len(cells) == 1 else f"{markdown(cells)}\n\n{same}"


def main(arguments: Sequence[str]) -> int:
    """Compares; returns the exit status."""
    parser = argparse.ArgumentParser("chunkdist bench compare", description="What moved between results.")
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--threshold", type=float, default=1.1, help="worse than that fails; default: 1.1")
    options = parser.parse_args(arguments)
    if not options.threshold >= 1:
        parser.error(f"--threshold {options.threshold:g} fails on what is the same: write 1 or more")
    try:
        old, new = (json.loads(file.read_text(encoding="utf-8")) for file in (options.old, options.new))
        changes = moved(old, new)
    except (OSError, ValueError) as error:  # no file, no JSON, nothing to compare
        parser.error(f"{options.old} and {options.new} cannot be compared: {error}")
    print(text(changes, options.threshold))
    return 1 if any(not change["worse"] <= options.threshold for change in changes) else 0
