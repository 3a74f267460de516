"""The table of docs/sharding.md, from docs/benchmarks/sharding-cpu.json, by docs/make_benchmarks.py."""

from __future__ import annotations

from pathlib import Path

from tables import DOCS, RESULTS, Result, filled, paragraph, required

PAGE = DOCS / "sharding.md"
FIGURES = ("gathers", "gathered_bytes", "reductions", "sent_bytes")


def page_of_results(page: str, folder: Path = RESULTS) -> str:
    """`page` with the table of the committed result."""
    return filled(page, "sharding figures", _text(required("sharding-cpu", folder)))


def _text(result: Result) -> str:
    lengths = " and ".join(f"{length:,}" for length in result["lengths"])
    layers, weights = result["model"]["num_layers"], _mib(result["parameter_bytes"])
    text = f"""Of one rank in one step, counted at the process group: Llama of {layers} layers, {weights} MiB
of weights, {result["num_ranks"]} ranks with sequences of {lengths} tokens, in one chunk or in chunks of
{result["chunk_size"]}. Sent: by ring algorithms, gathers and reductions together. *Leaves*: the plain
model's layers are ZeRO-3's leaf modules, as those of a chunked one. Ways with the same figures share a
row."""
    alike: dict[tuple[object, ...], list[str]] = {}
    for row in result["rows"]:
        figures = (row["engine"], row["training"], *(row[figure] for figure in FIGURES))
        alike.setdefault(figures, []).append(row["way"])
    rows = [
        "| engine | training | | gathers | MiB gathered | reductions | MiB sent |",
        "|---|---|---|---|---|---|---|",
    ]
    for (engine, training, gathers, gathered, reductions, sent), ways in alike.items():
        figures = f"{gathers} | {_mib(gathered)} | {reductions} | {_mib(sent)}"
        rows.append(f"| {engine} | {training} | {'; '.join(ways)} | {figures} |")
    ranks = (
        "alike on all ranks"
        if all(row["all_ranks_alike"] for row in result["rows"])
        else "of rank 0; others differ"
    )
    return "\n".join([paragraph(text), "", *rows, "", f"All figures are {ranks}. `{result['command']}`."])


def _mib(num_bytes: object) -> str:
    assert isinstance(num_bytes, int)
    return f"{num_bytes / 2**20:,.1f}"
