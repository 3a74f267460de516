"""The picture of the grid, from a run of the code, and README.md's table from docs/benchmarks, which
docs/make_benchmarks.py writes.

    python docs/make_figures.py     # the picture alone
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Patch, Rectangle
from tables import DOCS, RESULTS, UNKNOWN, Result, filled, read_result
from transformers import LlamaConfig, LlamaForCausalLM

from chunkdist import ChunkConfig, chunk_model
from chunkdist.bench.ways import BASELINE

PAGE = DOCS.parent / "README.md"
BASELINE_NOTE = """Gradient checkpointing is Hugging Face's, of every layer, with the same attention
kernel and, but where the row says otherwise, the same tiled loss. Results are kept in `docs/benchmarks`."""
_DTYPES = {"float32": "fp32", "bfloat16": "bf16"}
NUM_LAYERS, LAYERS_PER_GROUP = 8, 2
NUM_GROUPS = NUM_LAYERS // LAYERS_PER_GROUP
NUM_CHUNKS, CHUNK_SIZE = 6, 16
MOMENT = 10
"""The backward is drawn while it runs its cell of this number."""

INPUT, KV, KV_GRAD, GRAPH = (
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#D55E00",
)  # Okabe and Ito: told apart by everyone
CELL, DONE, INK = "#DCEAF5", "#F1F1F1", "#222222"


@dataclass(frozen=True, kw_only=True)
class Visit:
    """A run of one cell; both count from 0."""

    group: int
    chunk: int
    with_graph: bool


def recorded_step() -> tuple[list[Visit], list[Visit]]:
    """The cells that one training step of a tiny model runs, in their order: forward, and backward."""
    hidden_size = 16
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=hidden_size,
        intermediate_size=32,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=NUM_CHUNKS * CHUNK_SIZE,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).train()
    visits: list[Visit] = []

    def record(group: int, hidden: torch.Tensor) -> None:
        if (
            hidden.shape[1] == CHUNK_SIZE
        ):  # not the single token on which a group learns what its layers return
            chunk = hidden.storage_offset() // (hidden_size * CHUNK_SIZE)
            visits.append(Visit(group=group, chunk=chunk, with_graph=torch.is_grad_enabled()))

    for group in range(NUM_GROUPS):
        first_norm: Any = model.model.layers[group * LAYERS_PER_GROUP].input_layernorm
        first_norm.register_forward_pre_hook(lambda module, args, group=group: record(group, args[0]))
    chunk_model(model, ChunkConfig(chunk_size=CHUNK_SIZE, layers_per_group=LAYERS_PER_GROUP))
    ids = torch.zeros((1, NUM_CHUNKS * CHUNK_SIZE), dtype=torch.long)
    loss = model(input_ids=ids, labels=ids).loss
    in_forward = visits.copy()
    loss.backward()
    return in_forward, visits[len(in_forward) :]


def grid_figure() -> Figure:
    """The grid of cells in a step: the forward, and the backward at one moment."""
    in_forward, in_backward = recorded_step()
    figure = Figure(figsize=(12, 5.2), facecolor="white")
    left, right = figure.subplots(1, 2)
    figure.subplots_adjust(left=0.075, right=0.995, top=0.93, bottom=0.13, wspace=0.03)
    left.set_title("forward: each cell runs without a graph", fontsize=12, color=INK)
    right.set_title(f"backward, in its cell {MOMENT} of {len(in_backward)}", fontsize=12, color=INK)
    _frame(left, with_names=True)
    _frame(right, with_names=False)
    for number, visit in enumerate(in_forward, start=1):
        assert not visit.with_graph
        _cell(left, visit, number, CELL)
        _strip(left, visit.group, visit.chunk, 0, KV)
    for group in range(NUM_GROUPS):
        _group_input(left, group)
    running = in_backward[MOMENT - 1]
    for number, visit in enumerate(in_backward, start=1):
        assert visit.with_graph
        _cell(right, visit, number, DONE if number < MOMENT else GRAPH if number == MOMENT else CELL)
        if visit.group <= running.group:
            _strip(right, visit.group, visit.chunk, 0, KV)
        if visit.group == running.group:
            _strip(right, visit.group, visit.chunk, 1, KV_GRAD)
    for group in range(running.group + 1):
        _group_input(right, group)
    for chunk in range(running.chunk):
        _gradient_arrow(right, running, chunk)
    figure.legend(
        handles=[
            Patch(color=INPUT, label="a group's input: hidden states of all tokens"),
            Patch(color=KV, label="keys and values"),
            Patch(color=KV_GRAD, label="their gradients, of the running group"),
            Patch(color=GRAPH, label="the running cell's graph"),
            Patch(color=CELL, label="runs without a graph, or is still to run"),
            Patch(color=DONE, label="done"),
        ],
        loc="lower center",
        ncols=3,
        frameon=False,
        fontsize=10,
    )
    return figure


def _frame(axes: Axes, *, with_names: bool) -> None:
    axes.set_xlim(-0.15, NUM_CHUNKS + 0.05)
    axes.set_ylim(-0.75, NUM_GROUPS + 0.45)
    axes.axis("off")
    _bar(axes, -0.42, "embeddings")
    _bar(axes, NUM_GROUPS + 0.10, "final norm, head and loss, tile by tile")
    for chunk in range(NUM_CHUNKS):
        axes.text(chunk + 0.5, -0.68, f"chunk {chunk + 1}", ha="center", fontsize=9.5, color=INK)
    for group in range(NUM_GROUPS if with_names else 0):
        first = group * LAYERS_PER_GROUP + 1
        name = f"group {group + 1}\nlayers {first}-{first + LAYERS_PER_GROUP - 1}"
        axes.text(-0.25, group + 0.5, name, ha="right", va="center", fontsize=9.5, color=INK)


def _bar(axes: Axes, y: float, text: str) -> None:
    axes.add_patch(
        Rectangle((0.03, y), NUM_CHUNKS - 0.06, 0.28, facecolor="white", edgecolor="#AAAAAA", linewidth=0.8)
    )
    axes.text(NUM_CHUNKS / 2, y + 0.13, text, ha="center", va="center", fontsize=9.5, color=INK)


def _cell(axes: Axes, visit: Visit, number: int, color: str) -> None:
    box = FancyBboxPatch(
        (visit.chunk + 0.06, visit.group + 0.13),
        0.88,
        0.76,
        boxstyle="round,pad=0,rounding_size=0.06",
        facecolor=color,
        edgecolor="none",
    )
    axes.add_patch(box)
    ink = "white" if color == GRAPH else "#8A8A8A" if color == DONE else INK
    weight = "bold" if color == GRAPH else "normal"
    axes.text(
        visit.chunk + 0.5,
        visit.group + 0.66,
        str(number),
        ha="center",
        va="center",
        fontsize=12,
        color=ink,
        weight=weight,
    )


def _strip(axes: Axes, group: int, chunk: int, row: int, color: str) -> None:
    axes.add_patch(
        Rectangle((chunk + 0.14, group + 0.18 + 0.14 * row), 0.72, 0.1, facecolor=color, edgecolor="none")
    )


def _group_input(axes: Axes, group: int) -> None:
    axes.add_patch(Rectangle((0.03, group - 0.04), NUM_CHUNKS - 0.06, 0.1, facecolor=INPUT, edgecolor="none"))


def _gradient_arrow(axes: Axes, running: Visit, chunk: int) -> None:
    """From the running cell to the gradients of the keys and values that it read."""
    start, end = (running.chunk + 0.06, running.group + 0.5), (chunk + 0.6, running.group + 0.43)
    axes.add_patch(
        FancyArrowPatch(
            start,
            end,
            connectionstyle="arc3,rad=0.13",
            arrowstyle="-|>",
            mutation_scale=9,
            color=KV_GRAD,
            linewidth=1.2,
        )
    )


def readme_with_table(readme: str, step: Result | None, memory: Result | None) -> str:
    """`readme`, with the table between its marks made from the results, as far as there are any."""
    return filled(readme, "figures", _table(step, memory))


def page_of_results(readme: str, folder: Path = RESULTS) -> str:
    """`readme` with the table of the committed results."""
    return readme_with_table(readme, read_result("step-cpu", folder), read_result("memory", folder))


def _table(step: Result | None, memory: Result | None) -> str:
    timed, counted = ({} if found is None else found["summary"] for found in (step, memory))
    rows = ["| | memory a token | time of a step | gradients differ by |", "|---|---|---|---|"]
    for name in counted or timed or {BASELINE: None}:
        cells = [UNKNOWN] * 3
        if name in counted:
            cells[0] = f"{counted[name]['bytes_per_token'] / 1024:,.0f} KiB"
        if name in timed:
            cells[1] = f"{timed[name]['wall_ratio']:.2f} x"
            cells[2] = (
                "reference" if name == BASELINE else f"{timed[name]['largest_gradient_difference']:.0e}"
            )
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*rows, "", _memory_note(memory), "", _step_note(step), "", BASELINE_NOTE])


def _memory_note(memory: Result | None) -> str:
    if memory is None:
        return "*Memory*: `python -m chunkdist.bench.memory --json docs/benchmarks/memory.json`."
    lengths = " and ".join(f"{int(length):,}" for length in memory["summary"][BASELINE]["peak_bytes"])
    return f"""*Memory*: what a token of the sequence adds to the peak of a step; Llama-3-8B, LoRA, bf16,
{memory["chunk_size"]:,} tokens a chunk, between {lengths} tokens. Counted with fake tensors, without a GPU:
`{memory["command"]}`."""


def _step_note(step: Result | None) -> str:
    if step is None:
        return "*Time and gradients*: `python -m chunkdist.bench.step --json docs/benchmarks/step-cpu.json`."
    sizes, machine = step["model"], step["hardware"]
    parameters = f"{sizes['num_parameters'] / 1e6:.1f}M"
    return f"""*Time and gradients*: forward and backward of a Llama of {parameters} parameters
({sizes["num_layers"]} layers, hidden size {sizes["hidden_size"]}) in {_DTYPES[sizes["dtype"]]},
{sizes["num_tokens"]:,} tokens in chunks of {sizes["chunk_size"]:,}, {machine["num_threads"]} thread(s) of
{machine.get("gpu", machine["cpu"])}, median of {step["num_repetitions"]} round(s):
`{step["command"]}`.
Differences are relative, of the worst parameter; in fp64 the tests ask for 1e-10."""


def main() -> None:
    """Draws the picture."""
    matplotlib.rcParams["svg.hashsalt"] = "chunkdist"  # the same file from the same run
    figures = DOCS / "figures"
    figures.mkdir(exist_ok=True)
    grid_figure().savefig(figures / "grid.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
