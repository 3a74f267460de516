"""Whose code a step's host time is spent in, by cProfile. On a CPU only: with CUDA, autograd runs the
backward in a thread of its own, which cProfile does not see."""

from __future__ import annotations

import cProfile
import pstats
import time
from collections.abc import Callable
from pathlib import PurePath
from typing import Any

OPERATORS, CHUNKDIST, MODEL, TORCH, OTHER = (
    "torch's operators and autograd's engine",
    "chunkdist's Python",
    "the model's Python (transformers, peft)",
    "torch's Python",
    "other",
)
_PACKAGES = {"chunkdist": CHUNKDIST, "transformers": MODEL, "peft": MODEL, "torch": TORCH}


def python_shares(step: Callable[[], Any]) -> dict[str, float]:
    """Shares of a step, the largest first. Python's are upper bounds: the profiler makes it slower, operators
    not, and one that is written as `+=` or `[...]` counts as the Python in which it stands."""
    profiler = cProfile.Profile(time.process_time)  # not while other processes run
    profiler.runcall(step)
    seconds = dict.fromkeys((OPERATORS, CHUNKDIST, MODEL, TORCH, OTHER), 0.0)
    stats: Any = pstats.Stats(profiler)
    for (file, _, name), (_, _, own_s, *_) in stats.stats.items():
        seconds[_whose(file, name)] += own_s
    total = sum(seconds.values())
    return {whose: own_s / total for whose, own_s in sorted(seconds.items(), key=lambda item: -item[1])}


def _whose(file: str, name: str) -> str:
    if file == "~":  # written in C, no file: methods of tensors and functions of torch name it
        return OPERATORS if "torch" in name or "Tensor" in name else OTHER
    for part in reversed(PurePath(file).parts):
        if part in _PACKAGES:
            return _PACKAGES[part]
    return OTHER
