"""What moved between two results of one benchmark; exit status 1 on a slowdown above a threshold.

Rows with the same name are compared; one that is gone is worse, and so is a run that now fails, or a check
that no longer passes. Between machines, and on a busy one, only ratios to a baseline in the same run can be
compared: they are judged where a row has any, else seconds and rates are. So are bytes and errors.

    python -m chunkdist.bench.compare OLD.json NEW.json [--threshold 1.1] [--figures NAME ...]
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from chunkdist.bench.options import parser_of

RATIOS = ("wall_ratio", "cpu_ratio", "ratio", "of_exact", "of_forward")
SPEEDUPS = ("wall_speedup", "cpu_speedup")
SECONDS = ("wall_s", "cpu_s", "median_wall_s", "median_s", "forward_s", "backward_s", "host_s_per_cell")
ABSOLUTE = (*SECONDS, "tokens_per_s", "mfu")
"""Of one machine: judged where a row has no ratio and no speedup."""
ERRORS = ("largest_gradient_difference", "error", "worst")
LESS_IS_BETTER = (
    *("peak_allocated_bytes", "peak_reserved_bytes", "bytes_per_token"),
    *ERRORS,
    *("gathers", "gathered_bytes", "reductions", "sent_bytes"),
)
MORE_IS_BETTER = ("fits", "mfu", "tokens_per_s", *SPEEDUPS)
_NAMES = ("engine", "training", "way", "name", "backend", "dtype", "num_tokens", "num_queries", "num_before")
_SMALLEST, _ROUNDING = 1e-12, 1e-5
"""Differences below it are none: no figure is as small, and no error that is more than rounding in fp32."""


def rows(result: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row of a result, and what it is called."""
    found = result.get("rows")
    if found is None:
        yield from result.get("summary", {}).items()
        return
    for row in [*found, *result.get("rates", [])]:
        yield ", ".join(str(row[name]) for name in _NAMES if row.get(name) is not None), row


def moved(old: dict[str, Any], new: dict[str, Any], figures: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Every figure that both have: what it was, is, and by what factor it is worse (below 1: better;
    infinite: what was there is gone, fails or is NaN).

    Args:
        figures: These alone, of which less is better where more is not known to be; by default all that are
            known. What is gone or fails is told in any case.

    Raises:
        ValueError: the results are of different benchmarks, models or baselines, or have no row, or no
            figure, or none of `figures`, in common.
    """
    if old.get("benchmark") != new.get("benchmark"):
        raise ValueError(
            f"the results are of {old.get('benchmark')} and {new.get('benchmark')}: compare equals"
        )
    for what in ("model", "baseline"):
        if (difference := _difference(old.get(what), new.get(what))) is not None:
            raise ValueError(f"the results differ in {what}: {difference}: compare equals")
    before, after = dict(rows(old)), dict(rows(new))
    changes = _broken("all", old, new)
    common = [name for name in after if name in before]
    if not (common or changes):
        raise ValueError("the results have no row in common: run both with the same options")
    changes += [_lost(name, "row") for name in before if name not in after]
    compared: list[dict[str, Any]] = []
    for name in common:
        was, row = before[name], after[name]
        changes += _broken(name, was, row)
        if row.get("outcome", "ran") != was.get("outcome", "ran"):
            better = was.get("outcome", "ran") != "ran"
            changes.append(
                {"row": name, "figure": "outcome", "worse": 0.0} if better else _lost(name, "outcome")
            )
            continue
        for figure in figures or _judged(was, row):
            compared += _change(name, figure, was.get(figure), row.get(figure))
    if common and not (compared or changes):
        wanted = f"none of {', '.join(figures)}" if figures else "no figure that is known"
        raise ValueError(f"the results have {wanted} in common: write other --figures")
    return [*changes, *compared]


def _difference(old: Any, new: Any) -> str | None:
    """Of two values, or of what both dicts have."""
    if isinstance(old, dict) and isinstance(new, dict):
        pairs = [(f"{key} ", old[key], new[key]) for key in old if key in new]
    else:
        pairs = [("", old, new)] if None not in (old, new) else []
    return next((f"{key}{was} and {now}" for key, was, now in pairs if was != now), None)


def _judged(was: dict[str, Any], row: dict[str, Any]) -> list[str]:
    relative = [figure for figure in (*RATIOS, *SPEEDUPS) if figure in was and figure in row]
    known = dict.fromkeys((*RATIOS, *ABSOLUTE, *LESS_IS_BETTER, *MORE_IS_BETTER))
    return [figure for figure in known if not (relative and figure in ABSOLUTE)]


def _broken(name: str, was: dict[str, Any], row: dict[str, Any]) -> list[dict[str, Any]]:
    """Whether a run or a row fails that has not, or no longer passes its check."""
    failed = "failed" in row and "failed" not in was
    wrong = row.get("passed") is False and was.get("passed") is not False
    return [_lost(name, figure) for figure, is_so in (("failed", failed), ("passed", wrong)) if is_so]


def _lost(name: str, figure: str) -> dict[str, Any]:
    return {"row": name, "figure": figure, "worse": float("inf")}


def _change(name: str, figure: str, old: Any, new: Any) -> list[dict[str, Any]]:
    if not isinstance(old, int | float):
        return []
    if not isinstance(new, int | float) or math.isnan(new):
        return [_lost(name, figure)]
    least = _ROUNDING if figure in ERRORS else _SMALLEST
    worse = (new + least) / (old + least)
    if figure in MORE_IS_BETTER:
        worse = 1 / worse
    worse = 0.0 if math.isnan(old) else worse
    return [{"row": name, "figure": figure, "old": old, "new": new, "worse": worse}]


def table(changes: Sequence[dict[str, Any]], threshold: float) -> str:
    """What is worse or better by more than the threshold, for people to read."""
    lines = []
    for change in sorted(changes, key=lambda change: -change["worse"]):
        if 1 / threshold <= change["worse"] <= threshold:
            continue
        verdict = "WORSE" if change["worse"] > 1 else "better"
        values = "".join(f"{change[when]:14.6g}" for when in ("old", "new") if when in change)
        lines.append(f"{verdict:7}{change['worse']:8.3f}  {change['figure']:28}{values}  {change['row']}")
    num_same = len(changes) - len(lines)
    return "\n".join([*lines, f"{num_same} of {len(changes)} figures within a factor of {threshold:g}"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Compares; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = parser_of("compare", "What moved between two results.", has_result=False)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument(
        "--threshold", type=float, default=1.1, help="a factor; worse than that fails; default: 1.1"
    )
    parser.add_argument(
        "--figures", nargs="+", default=[], metavar="NAME", help="these alone; of them, less is better"
    )
    options = parser.parse_args(given)
    if not options.threshold >= 1:
        parser.error(f"--threshold {options.threshold:g} fails on what is the same: write 1 or more")
    try:
        old, new = (json.loads(file.read_text(encoding="utf-8")) for file in (options.old, options.new))
        changes = moved(old, new, options.figures)
    except (OSError, ValueError) as error:  # no file, no JSON, nothing to compare
        parser.error(f"{options.old} and {options.new} cannot be compared: {error}")
    print(table(changes, options.threshold))
    return 1 if any(not change["worse"] <= options.threshold for change in changes) else 0


if __name__ == "__main__":
    sys.exit(main())
