"""The tables of docs/pipeline.md, from docs/benchmarks/pipeline.json; written by docs/make_benchmarks.py."""

from __future__ import annotations

from pathlib import Path

from tables import DOCS, RESULTS, Result, filled, required

PAGE = DOCS / "pipeline.md"
NAMES = {"1f1b, equal lengths": "1F1B, equal lengths", "1f1b": "1F1B, lengths 4, 2, 1, 1"}


def page_of_results(page: str, folder: Path = RESULTS) -> str:
    """`page` with tables of the committed result."""
    return page_with_tables(page, required("pipeline", folder))


def page_with_tables(page: str, result: Result) -> str:
    """`page`, with what is between its marks made from the result."""
    tables = f"{_example(result)}\n\n{_long_tailed(result)}\n\n`{result['command']}`."
    return filled(page, "pipeline figures", tables)


def _example(result: Result) -> str:
    rows = ["| | takes | bubble | bubble and reruns | published |", "|---|---|---|---|---|"]
    for row in result["example"]:
        name = NAMES.get(row["name"], f"chunks of 2, {row['name']}")
        published = "-" if row["published"] is None else f"{row['published']:.1%}"
        lost = row["bubble_share"] + row["rerun_share"]
        rows.append(
            f"| {name} | {row['duration']:.0f} | {row['bubble_share']:.1%} | {lost:.1%} | {published} |"
        )
    return "\n".join(rows)


def _long_tailed(result: Result) -> str:
    rows = [
        "| stages | chunk size | K | ahead | largest bubble | mean | reruns | graphs | empty slots |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["long_tailed"]:
        rows.append(
            f"| {row['stages']} | {row['chunk_size']:,} | {row['retained_chunks']} | {row['forwards_ahead']} "
            f"| {row['largest_bubble']:.1%} | {row['mean_bubble']:.1%} | {row['rerun_share']:.1%} "
            f"| {row['peak_graphs']} | {row['empty_share']:.2%} |"
        )
    return "\n".join(rows)
