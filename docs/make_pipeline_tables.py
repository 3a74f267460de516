"""Makes the tables of docs/pipeline.md from docs/benchmarks/pipeline.json.

python docs/make_pipeline_tables.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Result = dict[str, Any]
DOCS = Path(__file__).parent
PAGE, RESULT = DOCS / "pipeline.md", DOCS / "benchmarks" / "pipeline.json"
BEGIN, END = "<!-- begin: pipeline figures -->", "<!-- end: pipeline figures -->"
NAMES = {"1f1b, equal lengths": "1F1B, equal lengths", "1f1b": "1F1B, lengths 4, 2, 1, 1"}


def page_with_tables(page: str, result: Result) -> str:
    """`page`, with what is between its two marks made from the result."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert end, f"the page has no {BEGIN} and {END}"
    tables = f"{_example(result)}\n\n{_long_tailed(result)}\n\n`{result['command']}`."
    return f"{before}{begin}\n{tables}\n{end}{after}"


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


def main() -> None:
    page = PAGE.read_text(encoding="utf-8")
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    PAGE.write_text(page_with_tables(page, result), encoding="utf-8")


if __name__ == "__main__":
    main()
