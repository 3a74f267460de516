"""What moved between two results of one benchmark; exit status 1 on a slowdown above a threshold.

Rows with the same name are compared. Between machines, and on a busy one, only ratios to a baseline in the
same run can be compared: they are judged where there are any, else seconds are. So are bytes and errors.

    python -m chunkdist.bench.compare OLD.json NEW.json [--threshold 1.1] [--figures NAME ...]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from chunkdist.bench.options import parser_of

RATIOS = ("wall_ratio", "cpu_ratio", "ratio", "of_exact", "of_forward")
LESS_IS_BETTER = (
    *("wall_s", "median_wall_s", "median_s", "forward_s", "backward_s", "host_s_per_cell"),
    *("peak_allocated_bytes", "peak_reserved_bytes", "bytes_per_token"),
    *("largest_gradient_difference", "error", "worst"),
    *("gathers", "gathered_bytes", "reductions", "sent_bytes"),
)
MORE_IS_BETTER = ("fits",)
_NAMES = ("engine", "training", "way", "name", "backend", "dtype", "num_tokens", "num_queries", "num_before")
_SMALLEST = 1e-12
"""Differences below it are none: no figure is as small."""


def rows(result: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row of a result, and what it is called."""
    found = result.get("rows")
    if found is None:
        yield from result.get("summary", {}).items()
        return
    for row in [*found, *result.get("rates", [])]:
        yield ", ".join(str(row[name]) for name in _NAMES if row.get(name) is not None), row


def moved(old: dict[str, Any], new: dict[str, Any], figures: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Every figure that both have: what it was, is, and by what factor it is worse (below 1: better).

    Args:
        figures: These alone, of which less is better; by default all that are known.

    Raises:
        ValueError: the results are of different benchmarks, or have no row, or none of `figures`, in common.
    """
    if old.get("benchmark") != new.get("benchmark"):
        raise ValueError(
            f"the results are of {old.get('benchmark')} and {new.get('benchmark')}: compare equals"
        )
    before = dict(rows(old))
    changes: list[dict[str, Any]] = []
    common = [(name, before[name], row) for name, row in rows(new) if name in before]
    if not common:
        raise ValueError("the results have no row in common: run both with the same options")
    for name, was, row in common:
        if row.get("outcome", "ran") != was.get("outcome", "ran"):
            worse = float("inf") if was["outcome"] == "ran" else 0.0
            changes.append({"row": name, "figure": "outcome", "worse": worse})
            continue
        if figures:
            for figure in figures:
                changes += _change(name, figure, was.get(figure), row.get(figure))
            continue
        ratios = [figure for figure in RATIOS if figure in was and figure in row]
        for figure in (*ratios, *LESS_IS_BETTER, *MORE_IS_BETTER):
            if figure in ratios or not (ratios and figure.endswith("_s")):
                changes += _change(name, figure, was.get(figure), row.get(figure))
    if figures and not changes:
        raise ValueError(f"the results have none of {', '.join(figures)} in common: write other --figures")
    return changes


def _change(name: str, figure: str, old: Any, new: Any) -> list[dict[str, Any]]:
    if not (isinstance(old, int | float) and isinstance(new, int | float)):
        return []
    worse = (new + _SMALLEST) / (old + _SMALLEST)
    if figure in MORE_IS_BETTER:
        worse = 1 / worse
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
    if options.threshold < 1:
        parser.error(f"--threshold {options.threshold:g} fails on what is the same: write 1 or more")
    old, new = (json.loads(file.read_text(encoding="utf-8")) for file in (options.old, options.new))
    changes = moved(old, new, options.figures)
    print(table(changes, options.threshold))
    return 1 if any(change["worse"] > options.threshold for change in changes) else 0


if __name__ == "__main__":
    sys.exit(main())
