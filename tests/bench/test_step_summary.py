"""What the docs' summary says of steps: of which way, and beside which."""

from __future__ import annotations

from typing import Any

from make_benchmarks import figure_of
from step_summary import PAPER, of_checkpointing, of_paper

from chunkdist.bench.ways import BASELINE, CHOICE, KEPT, ON_HOST, PLANNED, REBUILT

CUDNN = ", attention cudnn"


def row(
    way: str, median_s: float, num_tokens: int = 64, outcome: str = "ran", **figures: Any
) -> dict[str, Any]:
    return {"way": way, "num_tokens": num_tokens, "outcome": outcome, "median_wall_s": median_s, **figures}


def told(*rows: dict[str, Any], baseline: str = BASELINE) -> str | None:
    return of_checkpointing({"step": {"baseline": baseline, "rows": list(rows)}})


def test_the_best_way_is_named_once_and_the_planned_one_is_beside_it() -> None:
    """Which keeps graphs: it reruns less."""
    first = [row(BASELINE, 10.0), row(KEPT, 9.0), row(REBUILT, 9.5), row(PLANNED, 7.3)]
    second = [row(BASELINE, 20.0, 128), row(KEPT, 19.0, 128)]
    assert told(*first, *second) == f"{KEPT}: 0.90 x at 64 (auto: 0.73 x), 0.95 x at 128"
    assert told(row(BASELINE, 10.0), row(PLANNED, 7.3)) == "auto: 0.73 x at 64"
    assert told(row(KEPT, 1.0)) is None


def test_the_ratio_is_to_checkpointing_on_the_same_kernel() -> None:
    """And to what torch chooses, which is what a user gets."""
    rows = [row(BASELINE, 10.0), row(CHOICE, 6.0), row(KEPT, 9.0), row(PLANNED, 8.0)]
    choice = "to torch's choice of kernel"
    assert told(*rows) == f"{KEPT}: 0.90 x at 64 ({choice}: 1.50 x; auto: 0.80 x, {choice}: 1.33 x)"
    faster = row(f"{KEPT}{CUDNN}", 6.6)
    assert told(*rows[:3], faster) == f"{KEPT}{CUDNN}: 1.10 x {choice} at 64"
    own = row(f"{BASELINE}{CUDNN}", 5.5)
    assert told(*rows[:3], own, faster) == f"{KEPT}{CUDNN}: 1.20 x at 64 ({choice}: 1.10 x)"
    rows[1]["outcome"] = own["outcome"] = "failed: no kernel"
    assert told(*rows[:3], own, faster) == f"{KEPT}: 0.90 x at 64"
    assert told(row(CHOICE, 6.0), faster, baseline=CHOICE) == f"{KEPT}{CUDNN}: 1.10 x {choice} at 64"


def test_inputs_on_the_host_stand_in_for_checkpointing_without_room() -> None:
    rows = [row(BASELINE, 0.0, outcome="out of memory"), row(ON_HOST, 12.0), row(KEPT, 9.0)]
    assert told(*rows) == f"{KEPT}: 0.75 x to inputs on the host at 64"


def test_the_papers_loop_is_beside_ways_that_rerun_as_it_does() -> None:
    rows = [row(PAPER, 15.0, 16384), row(KEPT, 10.0, 16384), row(PLANNED, 5.0, 16384)]
    assert of_paper({"step": {"rows": rows}}) == f"1.50 x: {KEPT}"


def test_peaks_are_shown_of_lengths_that_have_no_ratio() -> None:
    """Where checkpointing had no room."""
    rows = [
        row(KEPT, 1.0, num_tokens, peak_allocated_bytes=num_tokens * 2**24, wall_ratio=0.9)
        for num_tokens in (64, 128, 256)
    ]
    for each in rows[1:]:
        del each["wall_ratio"]
    figure = figure_of({"benchmark": "step", "baseline": BASELINE, "rows": rows})
    assert figure is not None
    times, peaks = (axes.lines[0].get_xdata().tolist() for axes in figure.axes)
    assert (times, peaks) == ([64], [64, 128, 256])
