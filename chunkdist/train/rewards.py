"""What rewards a completion, by name: a function of TRL, one of the user's, or a reward model."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import numbers
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import torch
import trl.rewards

from chunkdist.train.launch.output import first_line

_NUMBERS = (numbers.Real, torch.Tensor, type(None))
_OF_TRL = [name for name in dir(trl.rewards) if name.endswith("_reward") and not name.startswith("get_")]


def rewards_of(names: list[str] | None) -> list[Any]:
    """What `GRPOTrainer` takes as `reward_funcs`.

    Raises:
        ValueError: there are none, or one cannot be found; says how to write it.
    """
    if not names:
        raise ValueError(
            f"reward_funcs is missing: write FILE.py:NAME, or one of TRL's functions, {', '.join(_OF_TRL)}"
        )
    return [_reward(name) for name in names]


def _reward(name: str) -> Any:
    place, _, function = name.rpartition(":")
    if place:
        try:
            found = getattr(_module(place), function)
        except Exception as error:  # code of the user's runs
            raise ValueError(f"reward_funcs: {name!r} cannot be taken: {first_line(error)}") from error
    elif Path(name).is_dir():
        return name
    else:
        found = getattr(trl.rewards, name, None) if name in _OF_TRL else None
    if not callable(found):
        raise ValueError(
            f"reward_funcs: {name!r} is no function: write FILE.py:NAME, package.module:NAME, the folder of "
            f"a reward model, or one of TRL's: {', '.join(_OF_TRL)}"
        )
    return _checked(name, found) if place and not inspect.iscoroutinefunction(found) else found


def _checked(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of the user's, whose faults are lines: it runs when training has begun."""

    @wraps(function)
    def checked(*args: Any, **given: Any) -> Any:
        try:
            found = function(*args, **given)
        except Exception as error:
            raise ValueError(f"reward_funcs: {name} failed: {type(error).__name__}: {error}") from error
        wanted = len(given.get("completions", ()))
        fits = isinstance(found, Sequence | torch.Tensor) and len(found) == wanted
        if not fits or not all(isinstance(x, _NUMBERS) for x in found):
            raise ValueError(
                f"reward_funcs: {name} returned {found!r:.80}: return a list of {wanted} numbers, one for "
                "each completion (None where it does not apply)"
            )
        if odd := [x for x in found if x is not None and not math.isfinite(x)]:
            raise ValueError(
                f"reward_funcs: {name} returned {float(odd[0])}, which ranks no completion: "
                "return numbers, and None where it does not apply"
            )
        return found

    return checked


def _module(place: str) -> Any:
    if not place.endswith(".py"):
        return importlib.import_module(place)
    spec = importlib.util.spec_from_file_location(Path(place).stem, place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
