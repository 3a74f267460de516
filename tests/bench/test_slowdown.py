"""CI fails when a chunked step has become slower, beside gradient checkpointing in the same run.

The baseline, step-ci.json, holds the command that makes it again. Ratios of the fastest of several rounds are
compared: of CPU time, which other programs on the machine hardly move, and, with more room, of wall time, in
which waiting shows. A run that looks slower is repeated: what is slower stays slower.
"""

from __future__ import annotations

import json
import shlex
import time
from pathlib import Path
from typing import Any

import pytest

from chunkdist.bench import compare, step
from chunkdist.engine.group import GroupCall

BASELINE = Path(__file__).with_name("step-ci.json")
LIMITS = {"cpu_ratio_of_fastest": 1.3, "wall_ratio_of_fastest": 1.6}
NUM_TRIES = 3


def slowdowns(folder: Path, *more: str) -> dict[str, float]:
    """Runs the baseline's command; by row and figure, by what factor it is slower than it may be."""
    old = json.loads(BASELINE.read_text())
    given = shlex.split(old["command"])[3:]
    file = folder / "new.json"
    given[given.index("--json") + 1] = str(file)
    assert step.main([*given, *more]) == 0
    changes = compare.moved(old, json.loads(file.read_text()), list(LIMITS))
    assert len(changes) >= len(LIMITS)
    return {
        f"{change['row']}: {change['figure']}": change["worse"]
        for change in changes
        if change["worse"] > LIMITS.get(change["figure"], 1.0)
    }


def test_steps_are_as_fast_as_they_were(tmp_path: Path) -> None:
    found: list[dict[str, float]] = []
    for _ in range(NUM_TRIES):
        found.append(slowdowns(tmp_path))
        if not found[-1]:
            return
    pytest.fail(f"slower than {BASELINE.name} in {NUM_TRIES} runs: {found}")


DEFAULT_ONLY = ("--repetitions", "2", "--without", "plain", "paper", "host", "kept", "one group")


def test_cells_that_run_again_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = GroupCall._run_layers

    def again(*args: Any, **kwargs: Any) -> Any:
        for _ in range(3):  # one would be a third of a step: near what the limits leave to noise
            real(*args, **kwargs)
        return real(*args, **kwargs)

    monkeypatch.setattr(GroupCall, "_run_layers", again)
    assert any("cpu_ratio" in name for name in slowdowns(tmp_path, *DEFAULT_ONLY))


def test_cells_that_wait_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = GroupCall._run_layers

    def late(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.02)
        return real(*args, **kwargs)

    monkeypatch.setattr(GroupCall, "_run_layers", late)
    assert any("wall_ratio" in name for name in slowdowns(tmp_path, *DEFAULT_ONLY))
