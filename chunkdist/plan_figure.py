"""The picture of `chunkdist plan`: the cells of a step over time, and what is alive meanwhile."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING

from chunkdist.memory.estimate import Stage

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GIB = 2**30
_MAX_CELLS = 400
"""More are drawn as one bar a group."""
_FAR = 4
_FORWARD_COLOR, _BACKWARD_COLOR, _LOSS_COLOR = "#56B4E9", "#D55E00", "#999999"
_COLORS = {
    "weights": "#666666",
    "optimizer": "#999999",
    "gradients": "#BBBBBB",
    "gathered weights": "#777777",
    "collectives": "#CCCCCC",
    "group inputs": "#E69F00",
    "hidden states": "#F0E442",
    "keys and values": "#009E73",
    "K/V gradients": "#CC79A7",
    "states": "#117733",
    "positions": "#DDCC77",
    "attention's backward": "#882255",
    "retained cells": "#0072B2",
    "one cell": "#D55E00",
    "loss tile": "#44AA99",
}
"""Okabe and Ito's, and Tol's, in the order in which they are stacked."""


def plan_figure(stages: list[Stage], num_chunks: int, memory_bytes: int, title: str) -> Figure:
    """Args:
    num_chunks: Of a row.
    memory_bytes: Drawn as a line: what there is.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.5), facecolor="white")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(1, 1.6))
    figure.suptitle(title, fontsize=11)
    figure.subplots_adjust(left=0.07, right=0.8, top=0.92, bottom=0.08, hspace=0.08)
    lengths = [_length(stage, num_chunks) for stage in stages]
    starts = [0.0, *accumulate(lengths)]
    num_groups = max(stage.group for stage in stages)
    for stage, start, length in zip(stages, starts, lengths, strict=False):
        _draw_cells(above, stage, start, length, num_chunks if num_chunks * num_groups <= _MAX_CELLS else 1)
    above.set_ylabel("group")
    above.set_ylim(-0.6, num_groups + 0.6)
    _draw_memory(below, stages, starts, memory_bytes)
    below.set_xlim(0, starts[-1])
    below.set_xticks([])
    below.set_xlabel("time")
    return figure


def _length(stage: Stage, num_chunks: int) -> float:
    """In forwards of a cell: a backward runs it again, and twice that for the gradients."""
    return {"forward": 1.0, "backward": 3.0}.get(stage.kind, 0.5) * num_chunks


def _draw_cells(axes: Axes, stage: Stage, start: float, length: float, num_cells: int) -> None:
    if stage.kind == "loss":
        axes.barh(stage.group, length, left=start, height=0.6, color=_LOSS_COLOR)
        axes.text(start + length / 2, stage.group, "loss", ha="center", va="center", fontsize=7)
        return
    color = _FORWARD_COLOR if stage.kind == "forward" else _BACKWARD_COLOR
    width = length / num_cells
    lefts = [start + index * width for index in range(num_cells)]
    axes.barh([stage.group] * num_cells, [width * 0.92] * num_cells, left=lefts, height=0.7, color=color)


def _draw_memory(axes: Axes, stages: list[Stage], starts: list[float], memory_bytes: int) -> None:
    edges, floor = starts, [0.0] * len(stages)
    for name, color in _COLORS.items():
        sizes = [stage.device.get(name, 0) / GIB for stage in stages]
        if not max(sizes):
            continue
        top = [low + size for low, size in zip(floor, sizes, strict=True)]
        axes.stairs(top, edges, baseline=floor, fill=True, color=color, label=name, linewidth=0)
        floor = top
    there = memory_bytes / GIB
    axes.set_ylabel("GiB alive, at most")
    if there > _FAR * max(floor):  # the line would leave nothing to see
        axes.text(0, 1.04 * max(floor), f" {there:.1f} GiB may be used", va="bottom", fontsize=8)
        axes.set_ylim(0, 1.15 * max(floor))
    else:
        axes.axhline(there, color="black", linestyle="--", linewidth=1)
        axes.text(0, there, " what may be used", va="bottom", fontsize=8)
        axes.set_ylim(0, 1.08 * max(there, *floor))
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(
        handles[::-1], labels[::-1], loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=8, frameon=False
    )
