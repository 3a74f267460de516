"""Whose fault an error is: that of the input or the environment is a line, ours a traceback."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from chunkdist import UnsupportedModelError
from chunkdist import chunking as modeling
from chunkdist.train.launch import faults
from chunkdist.train.launch.faults import StepWatch, asked_by, input_fault

FOREIGN = "/usr/lib/python3/site-packages/transformers/trainer.py"
ENGINE, INTEGRATION = str(modeling.__file__), str(faults.__file__)


def failing_in(file: str, code: str, **names: Any) -> Callable[[], None]:
    """A function of that file, which does `code`."""
    namespace: dict[str, Any] = {
        "__name__": "transformers.trainer" if file == FOREIGN else "chunkdist.x",
        **names,
    }
    exec(compile(f"def run():\n    {code}\n", file, "exec"), namespace)
    return namespace["run"]  # type: ignore[no-any-return]


def error_of(function: Callable[[], None]) -> BaseException:
    try:
        function()
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize(
    ("file", "code", "line"),
    [
        (INTEGRATION, "raise ValueError('packing: write false')", "packing: write false"),
        (ENGINE, "raise RuntimeError('no process group')", "no process group"),
        (ENGINE, "raise UnsupportedModelError('not exact')", "not exact"),
        (INTEGRATION, "int('x')", None),  # a ValueError, and nobody has raised it on purpose
        (INTEGRATION, "{}['key']", None),
        (INTEGRATION, "raise AssertionError('cannot be')", None),
        (INTEGRATION, "None.endswith('a')", None),
        (ENGINE, "torch.ones(2) @ torch.ones(3)", None),  # a RuntimeError of ours
        (INTEGRATION, "open('/no/such/file')", "/no/such/file: No such file or directory"),
        (FOREIGN, "raise OSError('no model of this name')", "no model of this name"),
        (FOREIGN, "raise ValueError('--tf32 needs a GPU')", "--tf32 needs a GPU"),
        (
            FOREIGN,
            "raise ImportError('wandb is missing')",
            "wandb is missing (in transformers/trainer.py, line 2)",
        ),
        (FOREIGN, "{}['lr']", "KeyError 'lr' (in transformers/trainer.py, line 2)"),
    ],
)
def test_before_the_first_step(file: str, code: str, line: str | None) -> None:
    names = {"UnsupportedModelError": UnsupportedModelError, "torch": torch}
    assert input_fault(error_of(failing_in(file, code, **names)), is_set_up=False) == line


@pytest.mark.parametrize("code", ["raise ValueError('a shape')", "raise KeyError('key')", "1 / 0"])
def test_other_packages_do_not_fail_by_options_once_a_step_has_begun(code: str) -> None:
    assert input_fault(error_of(failing_in(FOREIGN, code)), is_set_up=True) is None


def test_what_fails_below_our_engine_is_ours() -> None:
    inner = failing_in(FOREIGN, "raise TypeError('an argument')")
    below = failing_in(ENGINE, "inner()", inner=inner)
    beside = failing_in(INTEGRATION, "inner()", inner=inner)
    assert input_fault(error_of(below), is_set_up=False) is None
    assert "an argument" in str(input_fault(error_of(beside), is_set_up=False))


def test_memory_that_is_not_enough_is_no_fault_of_ours() -> None:
    error = torch.OutOfMemoryError("CUDA out of memory; 3 GiB are needed")
    assert input_fault(error, is_set_up=True) == "CUDA out of memory; 3 GiB are needed"


def test_other_packages_are_named_with_the_options_they_were_asked_for() -> None:
    def ask(code: str, file: str = FOREIGN) -> None:
        with asked_by("optim=sgd", "optim_args"):
            failing_in(file, code)()

    for code, message in (
        (
            "raise TypeError('momentum!')",
            "optim=sgd: a value of a wrong kind: momentum. .in transformers/trainer.py",
        ),
        ("raise ImportError('optim_args: no')", "^optim_args: optim_args: no"),
        ("{}['x']", "optim=sgd: KeyError 'x'"),
    ):
        with pytest.raises(ValueError, match=message):
            ask(code)
    with pytest.raises(KeyError):
        ask("{}['x']", file=INTEGRATION)
    with pytest.raises(FileNotFoundError):
        ask("open('/no/such/file')")
    with pytest.raises(AssertionError):
        ask("assert False")


def test_the_first_step_is_noted() -> None:
    watch = StepWatch()
    assert not watch.has_begun
    watch.on_step_begin(None, None, None)
    assert watch.has_begun
