"""Benchmarks that anybody can run on their own card. Each prints a table and writes JSON; docs/benchmarks has
the results that the docs quote.

They import torch, transformers and peft only, so that they run where nothing else is installed.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence

BENCHMARKS = {
    "all": "all of the others, one after another",
    "attention": "every attention backend of this machine against `math`: errors, then rates",
    "compare": "what moved between two results; fails on a slowdown",
    "long-tail": "an epoch of long-tailed data: token streams, padding, packing",
    "max-length": "the longest sequence that fits a given memory, on a GPU",
    "memory": "bytes a token of an 8B model, without a GPU",
    "profile": "a trace of a step, and its top kernels",
    "sharding": "gathers and bytes moved by a rank in a step, by engine",
    "spaco": "the time of a SpaCO step beside its parts",
    "step": "time and memory of a step by length, beside each baseline",
}
"""Name -> what it measures. The module has the name, with underscores."""


def run(name: str, arguments: Sequence[str]) -> int:
    """Runs one benchmark; returns the exit status."""
    module = importlib.import_module(module_of(name))
    status: int = module.main(arguments)
    return status


def module_of(name: str) -> str:
    """The module of a benchmark."""
    return f"{__name__}.{name.replace('-', '_')}"
