"""Benchmarks, whose results docs/benchmarks holds and the docs quote. Each prints a table and writes JSON.

They import torch, transformers and peft only, so that they run where nothing else is installed.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence

BENCHMARKS = {
    "hybrid-memory": "bytes a token of a hybrid model, without a GPU",
    "long-tail": "an epoch of long-tailed data: token streams, padding, packing",
    "memory": "bytes a token of an 8B model, without a GPU",
    "spaco": "the time of a SpaCO step beside its parts",
    "spaco-study": "what SpaCO's samplers cost in loss",
    "step": "time and memory of a step by length, beside each baseline",
}
"""Name -> what it measures. The module has the name, with underscores."""


def run(name: str, arguments: Sequence[str]) -> int:
    """Runs one benchmark; returns the exit status."""
    module = importlib.import_module(module_of(name))
    status: int = module.main(arguments)
    return status


def module_of(name: str) -> str:
    """Of a benchmark; `python -m` runs it, too."""
    return f"{__name__}.{name.replace('-', '_')}"
