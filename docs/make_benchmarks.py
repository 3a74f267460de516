"""Makes all tables of the docs, and the figures of docs/benchmarks.md, from the JSON in docs/benchmarks.

    python docs/make_benchmarks.py              # writes
    python docs/make_benchmarks.py --check      # exit status 1 when pages are not up to date; names them

docs/benchmarks.md has what `chunkdist bench all` measures on a GPU: results that are there, by the files'
names in `chunkdist.bench.jobs.JOBS`, are shown, for others the page says that nothing has been measured.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import make_data_tables
import make_figures
import make_memory_tables
import make_performance_tables
import make_pipeline_tables
import make_sharding_tables
import make_spaco_tables
import matplotlib
from matplotlib.figure import Figure
from step_summary import Results, chunked, of_checkpointing, of_paper, steps
from tables import DOCS, RESULTS, UNKNOWN, Result, filled, read_result

from chunkdist.bench import module_of
from chunkdist.bench.jobs import JOBS, Job
from chunkdist.bench.largest import largest
from chunkdist.bench.max_length import fits_text
from chunkdist.bench.spaco import NUM_CHUNKS
from chunkdist.bench.step import WARMED_UP
from chunkdist.bench.ways import BASELINE

PAGE = DOCS / "benchmarks.md"
LONG_STEP = "step-8b-24gib-128k"
OTHERS = (
    make_data_tables,
    make_figures,
    make_memory_tables,
    make_performance_tables,
    make_pipeline_tables,
    make_sharding_tables,
    make_spaco_tables,
)


def results_of(folder: Path) -> Results:
    """What `bench all` has left in a folder, by file name. One that is not whole is there, too."""
    found = {job.file: read_result(job.file, folder) for job in JOBS}
    return {name: result for name, result in found.items() if result is not None}


def page_of_results(page: str, folder: Path = RESULTS) -> str:
    """`page` with the summary and the tables of the results in `folder`."""
    results = results_of(folder)
    return filled(filled(page, "summary", _summary(results)), "results", _tables(results, folder))


def why_partial(result: Result) -> str | None:
    """Why a result is not whole; `None`: it is."""
    if "failed" in result:
        return str(result["failed"])
    return "it did not end" if result.get("partial") else None


def _summary(results: Results) -> str:
    rows = ["| | to reach | on a GPU |", "|---|---|---|"]
    for name, goal, files, figure in SUMMARY:
        own = {file: results[file] for file in files if file in results}
        found = figure(own)
        partial = [file for file, result in own.items() if why_partial(result) is not None]
        mark = f" (partial: {', '.join(partial)})" if partial and found is not None else ""
        rows.append(f"| {name} | {goal} | {UNKNOWN if found is None else found}{mark} |")
    gpus = sorted(
        {str(result["hardware"]["gpu"]) for result in results.values() if "gpu" in result["hardware"]}
    )
    return "\n".join([*rows, *([f"\nOn {', '.join(gpus)}."] if gpus else [])])


def _utilisation(results: Results) -> str | None:
    rows = [row for row in chunked(steps(results)) if row["num_tokens"] >= 65536]
    if not rows:
        return None
    best = max(rows, key=lambda row: row["mfu"])
    return f"{best['mfu']:.1%} at {best['num_tokens']:,}: {best['way']}"


def _utilisation_by_variant(results: Results) -> str | None:
    rows = [
        (row["mfu"], row["way"] + (", FlashAttention-3" if name.endswith("fa3") else ""))
        for name, result in results.items()
        for row in steps({name: result})
    ]
    return "; ".join(f"{way} {mfu:.1%}" for mfu, way in sorted(rows, reverse=True)) or None


def _longest(results: Results) -> str | None:
    searched = {name: result for name, result in results.items() if result["benchmark"] == "max-length"}
    found = [fits_text(row) for row in _searched(searched) if row["way"] != BASELINE and row["fits"]]
    for row in results.get(LONG_STEP, {}).get("rows", []):
        if row["outcome"] in ("ran", WARMED_UP):
            speed = f" at {row['tokens_per_s']:,.0f} tokens/s" if row["outcome"] == "ran" else ""
            peak = row["peak_reserved_bytes"] / 2**30
            found.append(f"a step of {row['num_tokens']:,}{speed}, {peak:.2f} GiB reserved")
    found += [f"{row['way']} {fits_text(row)}" for row in _searched(searched) if row["way"] == BASELINE]
    return "; ".join(found) or None


def _searched(results: Results) -> Iterator[Result]:
    for result in results.values():
        yield from result.get("rows", [])


def _exact(results: Results) -> str | None:
    rows = [row for row in chunked(steps(results)) if row["compared_with"] == BASELINE]
    every = [row for result in results.values() for row in result.get("rows", [])]
    wrong = [row for row in every if row["outcome"].startswith("wrong gradients")]
    found = [f"{largest(row['largest_gradient_difference'] for row in rows):.1e}"] if rows else []
    return "; ".join([*found, *(f"{row['way']}: {row['outcome']}" for row in wrong)]) or None


def _spaco(figure: str) -> Callable[[Results], str | None]:
    def found(results: Results) -> str | None:
        rows = [result.get("summary", {}).get("8 chunks", {}) for result in results.values()]
        return next((f"{row[figure]:.2f} x" for row in rows if figure in row), None)

    return found


def _error(results: Results) -> str | None:
    ratio = results.get("gradient-error", {}).get("largest_ratio_to_plain")
    return None if ratio is None else f"{ratio:.2f} x"


def _epoch(results: Results) -> str | None:
    row = results.get("long-tail", {}).get("summary", {}).get("token streams", {})
    return f"{row['wall_speedup']:.2f} x" if "wall_speedup" in row else None


def _gathers(results: Results) -> str | None:
    rows = results.get("sharding", {}).get("rows", [])
    plain = {
        (row["engine"], row["training"]): row["gathers"] for row in rows if row["way"].startswith("plain")
    }
    more = [
        row["gathers"] - plain[row["engine"], row["training"]]
        for row in rows
        if row["way"].endswith(" chunks") and (row["engine"], row["training"]) in plain
    ]
    return f"{max(more)} more" if more else None


WHOLE_CARD = ("step-8b", "step-8b-64k", "step-8b-128k")
WITHIN_24_GIB = ("step-8b-24gib", LONG_STEP)
SUMMARY: tuple[tuple[str, str, Sequence[str], Callable[[Results], str | None]], ...] = (
    (
        "8B with LoRA: best time of chunks, to gradient checkpointing",
        "1.00 x",
        WHOLE_CARD,
        of_checkpointing,
    ),
    ("the same within 24 GiB", "1.00 x", WITHIN_24_GIB, of_checkpointing),
    ("8B with LoRA at 16K: faster than the paper's loop", "1.3 x", ("step-8b",), of_paper),
    ("8B with LoRA at 64K and above: model FLOP utilisation", "50 %", WHOLE_CARD, _utilisation),
    (
        "4 of its layers at 64K: utilisation by kernel and variant",
        "-",
        ("step-4-layers-variants", "step-4-layers-fa3"),
        _utilisation_by_variant,
    ),
    (
        "longest sequence in 24 GiB, 8B with LoRA",
        "131,072",
        ("max-length-24gib", LONG_STEP, "max-length-24gib-checkpointing"),
        _longest,
    ),
    ("longest sequence on the whole card, within ten minutes", "-", ("max-length-card",), _longest),
    (
        "2 layers at 131,072: gradients, to those of checkpointing, in bf16",
        "-",
        ("step-2-layers-128k",),
        _exact,
    ),
    (
        f"SpaCO, 8 of {NUM_CHUNKS} chunks at 16K: faster than SeCO",
        "3 x",
        ("spaco-1b",),
        _spaco("faster_than_exact"),
    ),
    (
        f"SpaCO, 8 of {NUM_CHUNKS} chunks at 128K, to the no-grad forward",
        "1.3 x",
        ("spaco-1b-128k",),
        _spaco("of_forward"),
    ),
    ("bf16 gradients: largest error, to that of the plain model", "1 x", ("gradient-error",), _error),
    ("an epoch of long-tailed data: faster than padded rows", "-", ("long-tail",), _epoch),
    ("gathers of a step in many chunks, beside the plain model", "0 more", ("sharding",), _gathers),
)
"""Figures, what they should be, the results that they are read from, and how. One that is not whole counts,
and is named."""


def _tables(results: Results, folder: Path) -> str:
    parts = []
    for job in JOBS:
        parts.append(f"### {job.file}\n")
        result = results.get(job.file)
        if result is None:
            parts.append(f"{UNKNOWN}: `chunkdist bench {job.name}`, part {job.part}.\n")
        elif (why := why_partial(result)) is not None:
            parts.append(f"{why}: `{result['command']}`.\n")
            if result.get("rows") or result.get("summary"):
                parts += ["What there was by then:\n", _table(job, result)]
        else:
            parts.append(_table(job, result))
            if figure_of(result) is not None:
                parts.append(f"![time and memory by length](figures/{job.file}.svg)\n")
    return "\n".join(parts).rstrip()


def _table(job: Job, result: Result) -> str:
    text = importlib.import_module(module_of(job.name)).table(result)
    packages = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    hardware = result["hardware"]
    machine = hardware.get("gpu", hardware["cpu"])
    return f"```text\n{text}\n```\n\n`{result['command']}`; {machine}; {packages}.\n"


def figure_of(result: Result) -> Figure | None:
    """Time and peak memory by length, where a result of `step` has several; else `None`."""
    rows = [row for row in result.get("rows", []) if row.get("outcome") == "ran"]
    if result["benchmark"] != "step" or len({row["num_tokens"] for row in rows}) < 2:
        return None
    figure = Figure(figsize=(11, 4.2), facecolor="white", layout="constrained")
    time_axes, memory_axes = figure.subplots(1, 2)
    for way in dict.fromkeys(row["way"] for row in rows):
        mine = [row for row in rows if row["way"] == way]
        beside = [row for row in mine if "wall_ratio" in row]  # where the baseline had no room, none has one
        ratios = [row["wall_ratio"] for row in beside]
        time_axes.plot([row["num_tokens"] for row in beside], ratios, marker="o")
        counted = [row for row in mine if row["peak_allocated_bytes"] is not None]
        peaks = [row["peak_allocated_bytes"] / 2**30 for row in counted]
        memory_axes.plot([row["num_tokens"] for row in counted], peaks, marker="o", label=way)
    for axes, title in ((time_axes, f"time, to {BASELINE}"), (memory_axes, "peak memory, GiB")):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("tokens")
        axes.set_title(title)
        axes.set_ylim(bottom=0)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return figure


def written(folder: Path = RESULTS) -> Iterator[tuple[Path, str]]:
    """Each page, and what it should be."""
    for script in OTHERS:
        yield script.PAGE, script.page_of_results(script.PAGE.read_text(encoding="utf-8"))
    yield PAGE, page_of_results(PAGE.read_text(encoding="utf-8"), folder)


def write_figures(folder: Path, target: Path) -> list[Path]:
    """The figures of the results in `folder`, written to `target`."""
    matplotlib.rcParams["svg.hashsalt"] = "chunkdist"  # the same file from the same result
    files = []
    for name, result in results_of(folder).items():
        figure = None if why_partial(result) else figure_of(result)
        if figure is not None:
            figure.savefig(target / f"{name}.svg", metadata={"Date": None})
            files.append(target / f"{name}.svg")
    return files


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes, or compares; returns the exit status."""
    parser = argparse.ArgumentParser(description="Tables and figures of the docs, from docs/benchmarks.")
    parser.add_argument(
        "--check", action="store_true", help="write nothing: exit status 1 where pages are old"
    )
    if parser.parse_args(arguments).check:
        old = [page.name for page, text in written() if page.read_text(encoding="utf-8") != text]
        print("\n".join(f"{name} is not up to date: run python docs/make_benchmarks.py" for name in old))
        return 1 if old else 0
    for page, text in written():
        page.write_text(text, encoding="utf-8")
    write_figures(RESULTS, DOCS / "figures")
    return 0


if __name__ == "__main__":
    sys.exit(main())
