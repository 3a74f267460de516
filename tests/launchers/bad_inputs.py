"""What every table of bad inputs holds the launcher to: status 2, one line that names it, nothing written.

A table holds arguments and a word of the line each; `assert_refused` runs one case in this process.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a run in this process ended."""

    status: int
    lines: list[str]
    """The launcher's own lines on stderr."""
    stderr: str


def run_main(main: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> Ending:
    """One run of the launcher's `main`; the environment is afterwards as it was."""
    before, said = dict(os.environ), io.StringIO()
    try:
        with redirect_stderr(said):
            status = main([str(argument) for argument in arguments])
    finally:
        os.environ.clear()
        os.environ.update(before)
    text = said.getvalue()
    own = [line for line in text.splitlines() if line.startswith("chunkdist: ")]
    return Ending(status=status, lines=own, stderr=text)


def assert_refused(
    main: Callable[[Sequence[str]], int], arguments: Sequence[str], *, word: str, output_dir: Path
) -> str:
    """Holds that a run is refused with one line that contains `word`; returns the line.

    An exception that leaves `main` fails the test by itself: from a command line it would be a traceback.
    """
    before = _files(output_dir)
    ending = run_main(main, arguments)
    assert ending.status == 2, f"status {ending.status}: {ending.stderr}"
    assert len(ending.lines) == 1, ending.stderr
    line = ending.lines[0]
    assert word in line, f"{word!r} is not in {line!r}"
    assert "Traceback" not in ending.stderr
    assert len(line) < 600, f"nobody reads a line of {len(line)} characters: {line}"
    assert _files(output_dir) == before, "something was written"
    return line


def yaml_arguments(path: Path, **options: Any) -> list[str]:
    """Writes a YAML file of options; what is to be given to `main`."""
    path.write_text(yaml.safe_dump(options))
    return ["--config", str(path)]


def _files(folder: Path) -> set[str] | None:
    """All names in a folder; `None` where there is none."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")} if folder.exists() else None
