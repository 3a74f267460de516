"""The tables of docs/performance.md, from docs/benchmarks/overhead-cpu.json, by docs/make_benchmarks.py."""

from __future__ import annotations

from pathlib import Path

from tables import DOCS, RESULTS, Result, filled, paragraph, required

PAGE = DOCS / "performance.md"
STEP = DOCS.parent / "tests" / "bench" / "step-ci.json"
"""What CI compares with."""


def page_of_results(page: str, folder: Path = RESULTS) -> str:
    """`page` with the tables of the committed result."""
    result = required("overhead-cpu", folder)
    page = filled(page, "overhead figures", _text(result))
    page = filled(page, "python figures", _python_text(result))
    return filled(page, "kept figures", _kept_text(required(STEP.stem, STEP.parent)))


def _text(result: Result) -> str:
    model, machine = result["model"], result["hardware"]
    rows = [
        "| | cells | CPU time of a step | outside of operators, a cell | in operators |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        host_ms, share = row["host_s_per_cell"] * 1e3, row["kernel_share"]
        figures = f"{row['cpu_s']:.2f} s | {host_ms:.1f} ms | {share:.0%}"
        rows.append(f"| {row['way']} | {row['num_cells']} | {figures} |")
    note = f"""Llama of {model["num_parameters"] / 1e6:.1f}M parameters, {model["num_tokens"]:,} tokens,
{machine["num_threads"]} thread of {machine["cpu"]} at a load of {machine["load_average_1_min"]} when it
began, medians of {result["num_repetitions"]}: `{result["command"]}`."""
    return "\n".join([*rows, "", paragraph(note)])


def _python_text(result: Result) -> str:
    row = min(result["rows"], key=lambda row: row["chunk_size"])
    shares = [f"| {whose} | {share:.0%} |" for whose, share in row["python_shares"].items()]
    return "\n".join([f"| {row['way']} tokens, under cProfile | share |", "|---|---|", *shares])


def _kept_text(result: Result) -> str:
    kept, rebuilt = (
        result["summary"][f"chunked, K/V {how}"]["cpu_ratio"] for how in ("kept", "rebuilt (default)")
    )
    model = result["model"]
    return paragraph(
        f"""K/V kept: {kept:.2f} of the CPU time of gradient checkpointing, rebuilt: {rebuilt:.2f} (chunks of
        {model["chunk_size"]} of {model["num_tokens"]:,} tokens, `tests/bench/step-ci.json`)."""
    )
