"""What the summary of docs/benchmarks.md says of steps in chunks, beside other ways."""

from __future__ import annotations

from collections.abc import Iterator

from tables import Result

from chunkdist.bench.ways import BASELINE, CHOICE, ON_HOST, PLANNED, VARIANTS

PAPER = "the paper's chunk loop"
CUDNN = VARIANTS["cudnn"].label

Results = dict[str, Result]


def steps(results: Results) -> Iterator[Result]:
    """The rows of step's results that ran."""
    for result in results.values():
        yield from (row for row in result.get("rows", []) if row["outcome"] == "ran")


def chunked(rows: Iterator[Result]) -> list[Result]:
    """Those in chunks."""
    return [row for row in rows if row["way"].startswith("chunked")]


def of_checkpointing(results: Results) -> str | None:
    """By length: the ratio of the fastest way that reruns chunks, which is named, and that of the planner's
    choice, to the fastest way of checkpointing with the same kernel and parts."""
    found: dict[int, list[tuple[Result, Result]]] = {}
    for result in results.values():
        for row in chunked(steps({"": result})):
            if _base(row, result) is not None:
                found.setdefault(row["num_tokens"], []).append((row, result))
    by_way: dict[str, list[str]] = {}
    for num_tokens, rows in sorted(found.items()):
        rerun = _fastest([pair for pair in rows if pair[0]["way"] != PLANNED])
        auto = _fastest([pair for pair in rows if pair[0]["way"] == PLANNED])
        planned = [] if auto is None else [f"auto: {_ratio(*auto)}{_beside(*auto)}"]
        if rerun is None:
            by_way.setdefault("", []).append(f"{planned[0]} at {num_tokens:,}")
            continue
        told = [note for note in (_beside(*rerun).removeprefix(", "), *planned) if note]
        notes = f" ({'; '.join(told)})" if told else ""
        by_way.setdefault(f"{rerun[0]['way']}: ", []).append(f"{_ratio(*rerun)} at {num_tokens:,}{notes}")
    return "; ".join(way + ", ".join(told) for way, told in by_way.items()) or None


def of_paper(results: Results) -> str | None:
    """At 16K, of the fastest way that reruns chunks, as the paper's loop does."""
    rows = [row for row in steps(results) if row["num_tokens"] == 16384]
    paper = [row["median_wall_s"] for row in rows if row["way"] == PAPER]
    ours = [row for row in chunked(iter(rows)) if row["way"] != PLANNED]
    if not (paper and ours):
        return None
    best = min(ours, key=lambda row: row["median_wall_s"])
    return f"{paper[0] / best['median_wall_s']:.2f} x: {best['way']}"


def _fastest(rows: list[tuple[Result, Result]]) -> tuple[Result, Result] | None:
    return min(rows, key=lambda pair: pair[0]["median_wall_s"], default=None)


def _ran(row: Result, result: Result) -> dict[str, Result]:
    """What ran beside a row, by way."""
    return {other["way"]: other for other in steps({"": result}) if other["num_tokens"] == row["num_tokens"]}


def _base(row: Result, result: Result) -> Result | None:
    """The fastest way of checkpointing with the kernel and the parts of `row`, that ran. Torch's own choice
    of kernel is cuDNN's on the GPUs that have it."""
    label = next((v.label for v in VARIANTS.values() if row["way"].endswith(f", {v.label}")), "")
    own = f"{BASELINE}, {label}"
    names = [own] if any(other["way"] == own for other in result["rows"]) else [BASELINE, ON_HOST]
    if label == CUDNN:
        names = [own, CHOICE]
    found = [other for name, other in _ran(row, result).items() if name in names]
    return min(found, key=lambda other: other["median_wall_s"], default=None)


def _times(row: Result, base: Result, result: Result) -> str:
    is_measured = base["way"] == result["baseline"] and "wall_ratio" in row
    ratio = row["wall_ratio"] if is_measured else row["median_wall_s"] / base["median_wall_s"]
    return f"{ratio:.2f} x"


def _ratio(row: Result, result: Result) -> str:
    """To `_base`, which is named where it is not what one expects."""
    base = _base(row, result)
    assert base is not None
    other = f" to {base['way'].removeprefix(f'{BASELINE}, ')}" if base["way"] in (CHOICE, ON_HOST) else ""
    return _times(row, base, result) + other


def _beside(row: Result, result: Result) -> str:
    """The ratio to checkpointing with torch's own choice of kernel, which is what a user gets."""
    base, choice = _base(row, result), _ran(row, result).get(CHOICE)
    if choice is None or base is choice:
        return ""
    return f", to {CHOICE.removeprefix(f'{BASELINE}, ')}: {_times(row, choice, result)}"
