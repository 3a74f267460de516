"""The tables of docs/spaco.md, from docs/benchmarks/spaco-study.json and spaco-cpu.json; written by
docs/make_benchmarks.py."""

from __future__ import annotations

from pathlib import Path

from tables import DOCS, RESULTS, Result, filled, paragraph, read_result, required

from chunkdist.bench.spaco_study import summary

PAGE = DOCS / "spaco.md"


def page_with_tables(page: str, study: Result, cost: Result | None) -> str:
    """`page`, with what is between its marks made from the results."""
    measured = (
        "Not yet measured: `python -m chunkdist.bench.spaco --json FILE`." if cost is None else _cost(cost)
    )
    return filled(filled(page, "study", _study(study)), "cost", measured)


def _study(study: Result) -> str:
    sizes = study["sizes"]
    rates = ", ".join(f"{rate:g}" for rate in sizes["learning_rates"])
    text = f"""The quickstart's model on the standard library's source files, {sizes["num_steps"]} steps
of one sequence of {sizes["num_tokens"]:,} tokens in {sizes["num_chunks"]} chunks, from scratch with AdamW,
learning rates {rates}. Loss of {sizes["num_held_out"]} held-out sequences at each one's best rate, beside
exact gradients with the same seeds. The error is that of one gradient of the decoder layers, rms over
{sizes["num_draws"]} draws, relative to its norm, after exact training. *Only direct*: no sampler, but the
error were all relays exact, and only the sum over chunks sampled: with equal probabilities, and with the
best ones, which nobody knows before the backward."""
    rows = [
        "| sampler | budget | error of a gradient | learning rate | seeds | loss | above exact |",
        "|---|---|---|---|---|---|---|",
    ]
    trained = summary(study)
    for row in trained:
        error = "-" if row["gradient"] is None else _error(row["gradient"])
        spread = "" if row["standard_error"] is None else f" ± {row['standard_error']:.3f}"
        rows.append(
            f"| {row['sampler']} | {row['budget'] or 'all'} | {error} | {row['learning_rate']:g} | "
            f"{len(row['losses'])} | {row['loss']:.3f} | {row['above_exact']:.3f}{spread} |"
        )
    rows += [
        f"| only direct, {name} | {row['budget']} | {row[name]:.2f} | | | | |"
        for row in study["direct_errors"]
        for name in ("equal", "best")
    ]
    known = {(row["sampler"], row["budget"]) for row in trained}
    rows += [
        f"| {row['sampler']} | {row['budget']} | {_error(row)} | | | | |"
        for row in study["gradient_errors"]
        if (row["sampler"], row["budget"]) not in known
    ]
    return "\n".join([paragraph(text), "", *rows, "", f"`{study['command']}`."])


def _error(row: Result) -> str:
    return f"{row['rms_error']:.2f} ± {row['standard_error']:.2f}"


def _cost(cost: Result) -> str:
    model, machine = cost["model"], cost["hardware"]
    text = f"""Llama of {model["num_parameters"] / 1e6:.1f}M parameters, {model["num_tokens"]:,} tokens in
{model["num_chunks"]} chunks, {machine["num_threads"]} thread(s) of {machine.get("gpu", machine["cpu"])},
medians of {cost["num_repetitions"]} rounds. A step's parts are the forward without gradients, and the share
of the exact backward that its chunks are."""
    rows = ["| | time of an exact step | time of its parts |", "|---|---|---|"]
    for name, row in cost["summary"].items():
        if "ratio" in row:
            rows.append(f"| {name} | {row['of_exact']:.2f} x | {row['ratio']:.2f} x |")
    return "\n".join([paragraph(text), "", *rows, "", f"`{cost['command']}`."])


def page_of_results(page: str, folder: Path = RESULTS) -> str:
    """`page` with tables of the committed results."""
    return page_with_tables(page, required("spaco-study", folder), read_result("spaco-cpu", folder))
