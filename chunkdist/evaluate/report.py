"""What an evaluation found: tables for people, one picture, and JSON."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rich.table import Table

from chunkdist.evaluate.measure import EvalSettings, Evaluation
from chunkdist.evaluate.recall import TASKS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOSS, RECALL = "loss by position (nats a token)", "recall: share of answers that are right"


def tokens_name(num_tokens: int) -> str:
    """4K for 4,096, 1,000 for itself."""
    for unit, name in ((2**20, "M"), (2**10, "K")):
        if num_tokens and num_tokens % unit == 0:
            return f"{num_tokens // unit}{name}"
    return f"{num_tokens:,}"


def tables(found: Evaluation) -> Iterator[Table]:
    """Loss by position, a row for each length; recall, a row for each task and length."""
    settings, longest = found.settings, found.losses[-1]
    table = Table(title=LOSS, title_justify="left")
    table.add_column("tokens", justify="right")
    for name in longest.by_position:
        table.add_column(name, justify="right")
    table.add_column(f"the last {tokens_name(settings.tail_tokens)}", justify="right")
    for row in found.losses:
        losses = (_number(row.by_position.get(name)) for name in longest.by_position)
        table.add_row(f"{row.num_tokens:,}", *losses, _number(row.tail))
    yield table
    table = Table(title=RECALL, title_justify="left")
    table.add_column("task")
    table.add_column("tokens", justify="right")
    for depth in settings.depths:
        table.add_column(f"depth {depth:.0%}", justify="right")
    table.add_column("all", justify="right")
    for task in TASKS:
        for num_tokens in settings.lengths:
            shares = [found.share(task.name, num_tokens, depth) for depth in (*settings.depths, None)]
            table.add_row(task.name, f"{num_tokens:,}", *(f"{share:.0%}" for share in shares))
    yield table


def as_json(found: Evaluation) -> dict[str, Any]:
    """The same, for programs."""
    settings = found.settings
    return {
        "lengths": list(settings.lengths),
        "depths": list(settings.depths),
        "seed": settings.seed,
        "num_sequences": found.num_rows,
        "num_sequences_of_joined_documents": found.num_joined,
        "tail_tokens": settings.tail_tokens,
        "loss": [
            {"num_tokens": row.num_tokens, "tail_loss": row.tail, "by_position": row.by_position}
            for row in found.losses
        ],
        "recall": [
            {
                "task": row.task,
                "num_tokens": row.num_tokens,
                "depth": row.depth,
                "recall": row.share,
                "num_answers": row.num_answers,
                "token_accuracy": row.num_right_tokens / row.num_answer_tokens,
            }
            for row in found.recall
        ],
    }


def picture(found: Evaluation) -> Figure:
    """A heat map of recall (depth x length) for each task, beside the loss of the last tokens by how many
    stand before them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    settings: EvalSettings = found.settings
    figure = Figure(figsize=(3.4 * (len(TASKS) + 1), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    loss_axes, *axes_of_tasks = figure.subplots(1, len(TASKS) + 1)
    names = [tokens_name(num_tokens) for num_tokens in settings.lengths]
    points = [(index, row.tail) for index, row in enumerate(found.losses) if row.tail is not None]
    if points:
        loss_axes.plot(*zip(*points, strict=True), marker="o")
    loss_axes.set_xticks(range(len(names)), names)
    loss_axes.set_title(f"loss of the last {tokens_name(settings.tail_tokens)} tokens", fontsize="medium")
    loss_axes.set_xlabel("tokens of the sequence")
    loss_axes.grid(alpha=0.3)
    for axes, task in zip(axes_of_tasks, TASKS, strict=True):
        shares = [[found.share(task.name, n, depth) for n in settings.lengths] for depth in settings.depths]
        image = axes.imshow(shares, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axes.set_xticks(range(len(names)), names)
        axes.set_yticks(range(len(settings.depths)), [f"{depth:.0%}" for depth in settings.depths])
        axes.set_xlabel("tokens of the sequence")
        axes.set_title(f"recall: {task.name}", fontsize="medium")
        for y, row in enumerate(shares):
            for x, share in enumerate(row):
                axes.text(x, y, f"{share:.0%}", ha="center", va="center", fontsize="small")
    axes_of_tasks[0].set_ylabel("depth of the needle")
    figure.colorbar(image, ax=axes_of_tasks[-1])
    return figure


def _number(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.3f}"
