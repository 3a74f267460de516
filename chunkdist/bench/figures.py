"""What the rows of all benchmarks hold: how a figure is shown, and which direction is better.

Tables in the terminal and in the docs, and `chunkdist bench compare`, read this one description.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

KIB, MIB, GIB, TERA = 2**10, 2**20, 2**30, 1e12


@dataclass(frozen=True)
class Figure:
    """A key of a row.

    Args:
        title: The head of its column.
        show: The format of its value, which is divided by `unit` before.
        better: The direction that is an improvement; `None`: the figure is not judged.
        kind: A "ratio" is to a baseline of the same run and holds between machines; an "absolute" figure is
            one machine's, and is judged only in rows without ratios; an "error" below rounding is none; a
            "name" tells rows apart.
    """

    title: str
    show: str = "{}"
    unit: float = 1
    better: Literal["less", "more"] | None = None
    kind: Literal["ratio", "absolute", "error", "name"] | None = None


def _name(title: str, show: str = "{}") -> Figure:
    return Figure(title, show, kind="name")


def _ratio(title: str, better: Literal["less", "more"] = "less") -> Figure:
    return Figure(title, "{:.2f} x", better=better, kind="ratio")


FIGURES: dict[str, Figure] = {
    "backend": _name("backend"),
    "dtype": _name("dtype"),
    "case": _name("case"),
    "engine": _name("engine"),
    "model": _name("model"),
    "training": _name("training"),
    "num_tokens": _name("tokens", "{:,}"),
    "num_queries": _name("queries", "{:,}"),
    "num_before": _name("prefix", "{:,}"),
    "variant": _name("variant"),
    "kernel": _name("kernel"),
    "outcome": Figure("outcome"),
    "passed": Figure("passed"),
    "why_not": Figure("not run, since"),
    "median_wall_s": Figure("time", "{:.3f} s", 1, "less", "absolute"),
    "median_cpu_s": Figure("CPU time", "{:.3f} s", 1, "less", "absolute"),
    "forward_s": Figure("forward", "{:.2e} s", 1, "less", "absolute"),
    "backward_s": Figure("backward", "{:.2e} s", 1, "less", "absolute"),
    "seconds": Figure("seconds", "{:.4f}", 1, "less", "absolute"),
    "wall_ratio": _ratio("time ratio"),
    "cpu_ratio": _ratio("CPU time ratio"),
    "wall_speedup": _ratio("faster", "more"),
    "cpu_speedup": _ratio("faster, CPU time", "more"),
    "faster_than_exact": _ratio("faster than SeCO", "more"),
    "of_exact": _ratio("to an exact step"),
    "of_forward": _ratio("to the no-grad forward"),
    "of_parts": _ratio("to its parts"),
    "tokens_per_s": Figure("tokens/s", "{:,.0f}", 1, "more", "absolute"),
    "mfu": Figure("MFU", "{:.1%}", 1, "more", "absolute"),
    "mfu_needed": Figure("needed", "{:.1%}"),
    "forward_flops": Figure("TFLOP/s forward", "{:.4g}", TERA, "more", "absolute"),
    "backward_flops": Figure("backward", "{:.4g}", TERA, "more", "absolute"),
    "num_reruns": Figure("steps run again"),
    "count": Figure("runs", "{:,}"),
    "share": Figure("share", "{:.1%}"),
    "bytes_per_token": Figure("memory a token", "{:,.0f} KiB", KIB, "less"),
    "peak_bytes": Figure("device", "{:.2f} GiB", GIB, "less"),
    "peak_allocated_bytes": Figure("peak", "{:.2f} GiB", GIB, "less"),
    "peak_reserved_bytes": Figure("reserved", "{:.2f} GiB", GIB, "less"),
    "host_bytes": Figure("host", "{:.1f} GiB", GIB),
    "fits": Figure("fits", "{:,}", 1, "more"),
    "fails": Figure("does not fit", "{:,}"),
    "out_of_time": Figure("out of time"),
    "largest_gradient_difference": Figure("gradients differ by", "{:.0e}", 1, "less", "error"),
    **{
        f"{name}_error": Figure(name, "{:.1e}", 1, "less", "error")
        for name in ("out", "lse", "dq", "dk", "dv")
    },
    "gathers": Figure("gathers", "{:,}", 1, "less"),
    "gathered_bytes": Figure("MiB gathered", "{:,.1f}", MIB, "less"),
    "reductions": Figure("reductions", "{:,}", 1, "less"),
    "sent_bytes": Figure("MiB sent", "{:,.1f}", MIB, "less"),
    "all_ranks_alike": Figure("ranks alike"),
    "tokens_padded": Figure("tokens padded", "{:,}"),
    "tokens_recomputed": Figure("tokens recomputed", "{:,}"),
    "chunk_size": Figure("chunks", "{:,}"),
}
"""By the key of a row in the JSON."""


def table(rows: Iterable[dict[str, Any]], keys: Sequence[str], **titles: str) -> str:
    """A Markdown table with a column for each key of `FIGURES`; columns that no row has are left out.

    Args:
        titles: Other heads of columns, by key.
    """
    found = list(rows)
    keys = [key for key in keys if any(row.get(key) is not None for row in found)]
    head = [titles.get(key, FIGURES[key].title) for key in keys]
    return markdown([head, *([shown(key, row.get(key)) for key in keys] for row in found)])


def shown(key: str, value: Any) -> str:
    """A figure as text; "-" where there is none."""
    figure = FIGURES[key]
    if value is None or isinstance(value, bool):
        return {None: "-", True: "yes", False: "no"}[value]
    return figure.show.format(value if figure.unit == 1 else value / figure.unit)


def markdown(cells: Sequence[Sequence[str]]) -> str:
    """A Markdown table of texts, whose columns are aligned; the first row is the head."""
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    lines = [" | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) for row in cells]
    rule = " | ".join("-" * width for width in widths)
    return "\n".join(f"| {line} |" for line in [lines[0], rule, *lines[1:]])


def row_name(row: dict[str, Any]) -> str:
    """What a row is called."""
    names = [key for key, figure in FIGURES.items() if figure.kind == "name"]
    return ", ".join(str(row[key]) for key in names if row.get(key) is not None)
