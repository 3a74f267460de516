"""Whose fault an error is: the input's, which is one line and exit status 2, or ours, which is a traceback.

An error that our code raises on purpose is the input's (or the environment's), unless it is an assertion.
One that comes up in our code unasked (a KeyError, a TypeError of a call) is ours. What transformers, TRL,
datasets or another package raise is the input's where they were asked for something that only the input
decides: inside `asked_by`, and in a trainer that has not begun its first step.
"""

from __future__ import annotations

import dis
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from transformers import TrainerCallback

from chunkdist.recovery import is_out_of_memory

_OWN_FOLDERS = tuple(
    str(folder) + os.sep for folder in (Path(__file__).parents[2], Path(__file__).parents[3] / "launchers")
)
_INTEGRATIONS = str(Path(__file__).parents[1]) + os.sep
_OURS = (AssertionError, UnboundLocalError, NameError)


class StepWatch(TrainerCallback):
    """Notes whether a trainer has begun a step; until then it is being set up."""

    def __init__(self) -> None:
        self.has_begun = False

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.has_begun = True


@contextmanager
def asked_by(*options: str) -> Iterator[None]:
    """Around a call into another package, for what these options ask; the first is named where the message
    names none.

    Raises:
        ValueError: an error that came up inside that package; names the options.
    """
    try:
        yield
    except Exception as error:
        if _is_own(error) or is_out_of_memory(error) or isinstance(error, _OURS) or _is_of_system(error):
            raise
        names = _options_named(error, options)
        raise ValueError(f"{names}{': ' if names else ''}{_said(error)} ({_place(error)})") from error


def input_fault(error: BaseException, *, is_set_up: bool) -> str | None:
    """The line that says what is wrong with the input or the environment; `None`: the fault is ours.

    Args:
        is_set_up: Whether the trainer has begun its first step: errors of other packages are no longer about
            options then.
    """
    if isinstance(error, _OURS):
        return None
    if isinstance(error, OSError) and _is_of_system(error):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error)
    if isinstance(error, MemoryError) or is_out_of_memory(error):
        return _said(error)
    if _is_own(error):
        return _said(error) if _was_raised(error) else None
    if is_set_up:
        return None
    if isinstance(error, ValueError | NotImplementedError | OSError):
        return _said(error)
    is_ours = _package(error) == "torch" or _passed_engine(error)
    return None if is_ours else f"{_said(error)} ({_place(error)})"


def _is_own(error: BaseException) -> bool:
    """Whether an error came up in our code itself."""
    last = _innermost(error)
    return last is None or last.tb_frame.f_code.co_filename.startswith(_OWN_FOLDERS)


def _is_of_system(error: BaseException) -> bool:
    """Whether the operating system has refused something, rather than a package that also says OSError."""
    return isinstance(error, OSError) and error.errno is not None


def _passed_engine(error: BaseException) -> bool:
    """Whether an error came up below our engine, which may have called another package wrongly."""
    step = error.__traceback__
    while step is not None:
        file = step.tb_frame.f_code.co_filename
        if file.startswith(_OWN_FOLDERS[0]) and not file.startswith(_INTEGRATIONS):
            return True
        step = step.tb_next
    return False


def _was_raised(error: BaseException) -> bool:
    """Whether the innermost line is a `raise`, rather than a call or an operation that failed."""
    last = _innermost(error)
    if last is None:
        return True
    operation = last.tb_frame.f_code.co_code[last.tb_lasti]
    return dis.opname[operation] in ("RAISE_VARARGS", "RERAISE")


def _innermost(error: BaseException) -> TracebackType | None:
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    return last


def _place(error: BaseException) -> str:
    last = _innermost(error)
    assert last is not None
    path = Path(last.tb_frame.f_code.co_filename)
    parts = path.parts
    start = len(parts) - parts[::-1].index("site-packages") if "site-packages" in parts else len(parts) - 1
    return f"in {'/'.join(parts[start:])}, line {last.tb_lineno}"


def _package(error: BaseException) -> str:
    last = _innermost(error)
    return "" if last is None else str(last.tb_frame.f_globals.get("__name__", "")).partition(".")[0]


def _said(error: BaseException) -> str:
    """The message on one line; the kind, too, where the message alone would be a riddle."""
    text = " ".join(str(error).split())
    if isinstance(error, ValueError | RuntimeError | OSError | ImportError | NotImplementedError) and text:
        return text if len(text) <= 400 else text[:397] + "..."
    kind = "a value of a wrong kind:" if isinstance(error, TypeError) else type(error).__name__
    return f"{kind} {text}"[:400].strip()


def _options_named(error: BaseException, options: tuple[str, ...]) -> str:
    named = [option for option in options if re.search(rf"\b{option.partition('=')[0]}\b", str(error))]
    return ", ".join(named or options[:1])
