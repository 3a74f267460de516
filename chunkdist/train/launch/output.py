"""What a run says in one line."""

from __future__ import annotations

import os


def print_once(line: str) -> None:
    """Prints on the first process of the whole job."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(line, flush=True)


def first_line(error: BaseException) -> str:
    """The first line of the error's message; without one, its kind; of a missing key, both."""
    text = f"no {error} is known" if isinstance(error, KeyError) else str(error)
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[0].strip() if lines else type(error).__name__
