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
    parts = (_example(result), _long_tailed(result), _chosen(result), _interleaved(result))
    return filled(page, "pipeline figures", "\n\n".join((*parts, f"`{result['command']}`.")))


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


def _chosen(result: Result) -> str:
    rows = [
        "| room | chunk size | layers of each stage | K of each stage | ahead | largest bubble | mean "
        "| batches above 15 % | reruns |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["chosen"]:
        layers, retained = (", ".join(map(str, row[name])) for name in ("layers", "retained_chunks"))
        rows.append(
            f"| {row['max_graph_tokens']:,} | {row['chunk_size']:,} | {layers} | {retained} "
            f"| {row['forwards_ahead']} | {row['largest_bubble']:.1%} | {row['mean_bubble']:.1%} "
            f"| {row['num_batches_above_target']} of {row['num_batches']} | {row['rerun_share']:.1%} |"
        )
    return "\n".join(rows)


def _interleaved(result: Result) -> str:
    """The time is that of one stage a rank."""
    rows = [
        "| stages of a rank | chunk size | ahead | mean bubble | graphs | time |",
        "|---|---|---|---|---|---|",
    ]
    alone: dict[tuple[int, int], float] = {}
    for row in result["interleaved"]:
        setting = row["chunk_size"], row["forwards_ahead"]
        share = row["duration"] / alone.setdefault(setting, row["duration"])
        rows.append(
            f"| {row['stages_of_rank']} | {row['chunk_size']:,} | {row['forwards_ahead']} "
            f"| {row['mean_bubble']:.1%} | {row['peak_graphs']:.1f} | {share:.3f} |"
        )
    return "\n".join(rows)
