"""Options that are a mapping in JSON, or a file of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_json_file(path: Path, name: str) -> Any:
    """The mapping in a JSON file that an option names.

    Raises:
        ValueError: there is none; names the option and the file.
    """
    if path.is_fifo():
        raise ValueError(f"{name}='{path}' is a pipe, which can be read only once: write a file")
    try:
        text = path.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ValueError(f"{name}='{path}' cannot be read: {reason}") from error
    return read_json(text, where=f"{name}='{path}'")


def read_json(text: str, *, where: str) -> Any:
    """A JSON object.

    Raises:
        ValueError: it is broken, or something else than an object.
    """
    try:
        content = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{where} holds {type(content).__name__}, not a mapping: write {{...}}")
    return content
