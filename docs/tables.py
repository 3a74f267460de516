"""What the scripts share that make tables and figures of the docs from docs/benchmarks."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

Result = dict[str, Any]
DOCS = Path(__file__).parent
RESULTS = DOCS / "benchmarks"
UNKNOWN = "not yet measured"


def filled(page: str, name: str, text: str) -> str:
    """`page`, with `text` between its marks `<!-- begin: name -->` and `<!-- end: name -->`.

    Raises:
        ValueError: the page lacks one of them.
    """
    begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"the page has no {begin} with {end} after it: write both where the text is to go")
    return f"{before}{begin}\n{text}\n{end}{after}"


def read_result(name: str, folder: Path = RESULTS) -> Result | None:
    """The result in `{name}.json`; `None` where there is none.

    Raises:
        ValueError: it is of a run with `--smoke`.
    """
    file = folder / f"{name}.json"
    if not file.exists():
        return None
    result: Result = json.loads(file.read_text(encoding="utf-8"))
    if "--smoke" in result["command"].split():
        raise ValueError(f"{file} is of a run with --smoke, whose figures mean nothing: delete it")
    return result


def required(name: str, folder: Path = RESULTS) -> Result:
    """A result that is committed.

    Raises:
        ValueError: it is not there.
    """
    result = read_result(name, folder)
    if result is None:
        raise ValueError(f"{folder / name}.json is not there, and the docs quote it: restore it")
    return result


def paragraph(text: str) -> str:
    """`text`, wrapped as the docs are."""
    return textwrap.fill(" ".join(text.split()), width=128, break_on_hyphens=False, break_long_words=False)
