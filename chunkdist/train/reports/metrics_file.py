"""`metrics.jsonl`: one JSON object a logged optimizer step and one an evaluation, and the picture of them.

What always holds: every line is whole, also when the disk fills up in the middle of one, and no step is there
twice, also when a run goes on from a checkpoint older than its last line.
"""

from __future__ import annotations

import json
import math
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from chunkdist.files import save_figure, whole_file
from chunkdist.loss.by_position import Table, mean_table, short_number

Record = dict[str, Any]
BY_POSITION = "loss_by_position"
"""Key of `LossByPosition.table`, after a prefix where it is of an evaluation."""


class MetricsFile:
    """Appends records to a file. Every method may raise `OSError`, and then has left the file as it was."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def start(self, step: int) -> str | None:
        """Prepares the file for a run that starts after `step` (0: from the beginning).

        Lines of later steps are dropped, they are about to be trained again. A run from the beginning keeps
        what it finds under another name.

        Returns:
            One line on what was done to an existing file, if anything.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.exists() or not self.path.stat().st_size:
            return None
        if step == 0:
            earlier = self.path.with_name(f"{self.path.stem}.previous{self.path.suffix}")
            os.replace(self.path, earlier)
            return f"{self.path} is from an earlier run: renamed to {earlier.name}"
        records = self.read()
        kept = [record for record in records if record["step"] <= step]
        with whole_file(self.path) as unfinished:
            unfinished.write_bytes("".join(map(_line, kept)).encode())
        dropped = len(records) - len(kept)
        return (
            f"{self.path}: dropped {dropped} lines of steps after {step}, where training goes on"
            if dropped
            else None
        )

    def append(self, record: Record) -> None:
        """Writes one line, or nothing."""
        line = _line(record).encode()
        with open(self.path, "ab", buffering=0) as file:
            end = file.tell()
            try:
                if file.write(line) != len(line):
                    raise OSError(28, "No space left on device", str(self.path))
            except OSError:
                with suppress(OSError):
                    file.truncate(end)
                raise

    def read(self) -> list[Record]:
        """The records, one a step with its evaluation's figures. A line that is none (of a process that was
        killed while writing) is skipped."""
        records: dict[int, Record] = {}
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
                records.setdefault(int(record["step"]), {}).update(record)
            except (ValueError, TypeError, KeyError):
                continue
        return [records[step] for step in sorted(records)]


def draw(records: list[Record], path: Path) -> None:
    """A PNG of loss and peak memory over steps and, where it has been noted, of loss over position."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves = _curves(records)
    figure = Figure(figsize=(14 if curves else 8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    panels: Any = figure.subfigures(1, 2) if curves else (figure, None)
    over_steps, over_positions = panels
    loss_axes, memory_axes = over_steps.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    for axes, key, label in (
        (loss_axes, "loss", "loss"),
        (memory_axes, "peak_memory_gib", "peak GPU memory (GiB)"),
        (memory_axes, "peak_rss_gib", "peak resident memory (GiB)"),
    ):
        points = [(record["step"], record[key]) for record in records if record.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), marker="." if len(points) < 50 else None)
            axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    memory_axes.set_ylim(bottom=0)
    memory_axes.set_xlabel("optimizer step")
    if over_positions is not None:
        axes = over_positions.subplots()
        for label, rows in curves:
            axes.plot(*zip(*((end, loss) for _, end, loss, _ in rows), strict=True), marker=".", label=label)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda end, _: short_number(round(end)))
        axes.set_xlabel("position in the sequence, up to")
        axes.set_ylabel("mean loss of tokens there")
        axes.grid(alpha=0.3)
        axes.legend()
    save_figure(figure, path)


def _curves(records: list[Record]) -> list[tuple[str, Table]]:
    """Losses over position, of the first and the last evaluation; where there is none, of the first and the
    last tenth of the logged steps."""
    key = next((key for record in records for key in record if key.endswith(f"_{BY_POSITION}")), BY_POSITION)
    found = [(record["step"], record[key]) for record in records if record.get(key)]
    if not found:
        return []
    size = 1 if key != BY_POSITION else -(-len(found) // 10)
    parts = [found[:size], found[-size:]] if len(found) > 1 else [found]
    what = "training" if key == BY_POSITION else key.removesuffix(f"_{BY_POSITION}")
    return [(f"{what}, {_steps(part)}", mean_table([table for _, table in part])) for part in parts]


def _steps(part: list[tuple[int, Table]]) -> str:
    first, last = part[0][0], part[-1][0]
    return f"step {first:,}" if first == last else f"steps {first:,} to {last:,}"


def _line(record: Record) -> str:
    return json.dumps(_clean(record)) + "\n"


def _clean(value: Any) -> Any:
    """NaN and infinity are no JSON: null."""
    if isinstance(value, dict):
        return {key: _clean(x) for key, x in value.items()}
    if isinstance(value, list):
        return [_clean(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
