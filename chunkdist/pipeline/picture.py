"""A timeline as a picture."""

from __future__ import annotations

from pathlib import Path

from chunkdist.pipeline.simulate import Timeline

FORWARD, RERUN, BACKWARD = "#56B4E9", "#F0E442", "#E69F00"  # Okabe and Ito: told apart by everyone
_MOST_NUMBERED = 40


def draw_timeline(timeline: Timeline, file: Path, *, title: str = "") -> None:
    """Writes a picture, one line a stage, in the format of the file's ending. What is white is the bubble."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    count = len(timeline.spans)
    figure = Figure(figsize=(11, 1.4 + 0.45 * count), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for stage, spans in enumerate(timeline.spans):
        for color, pieces in (
            (FORWARD, [(s.start, s.end - s.start) for s in spans if s.action.kind == "F"]),
            (RERUN, [(s.start, s.rerun_end - s.start) for s in spans if s.action.kind == "B"]),
            (BACKWARD, [(s.rerun_end, s.end - s.rerun_end) for s in spans if s.action.kind == "B"]),
        ):
            drawn = [piece for piece in pieces if piece[1] > 0]
            axes.broken_barh(drawn, (stage - 0.4, 0.8), facecolors=color, edgecolor="black", linewidth=0.3)
        if len(timeline.schedule.micro_batches) <= _MOST_NUMBERED:
            for span in spans:
                middle = (span.start + span.end) / 2
                axes.text(middle, stage, str(span.action.micro_batch), ha="center", va="center", fontsize=7)
    axes.set_xlim(0, timeline.duration)
    axes.set_ylim(count - 0.5, -0.5)
    axes.set_yticks(range(count), [f"stage {stage}" for stage in range(count)])
    shares = f"bubble {timeline.bubble_share:.1%}, reruns {timeline.rerun_share:.1%}"
    axes.set_title(f"{title}: {shares}" if title else shares)
    colors = {"forward": FORWARD, "rerun": RERUN, "backward": BACKWARD}
    handles = [Patch(facecolor=color, edgecolor="black", label=name) for name, color in colors.items()]
    axes.legend(handles=handles, loc="upper right", ncols=3, fontsize=7)
    figure.savefig(file)
