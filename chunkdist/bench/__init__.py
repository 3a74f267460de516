"""Benchmarks, whose results docs/benchmarks holds and the docs quote. Each prints a table and writes JSON.

They import torch, transformers and peft only, so that they run where nothing else is installed.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence

BENCHMARKS = {
    "all": "all that a GPU is wanted for, in parts of ten minutes",
    "attention": "every attention backend of this machine against `math`: errors, then rates",
    "compare": "what moved between two results; fails on a slowdown",
    "gradient-error": "the error of bf16 gradients, chunked and plain, by length and chunk size",
    "hybrid-memory": "bytes a token of a hybrid model, without a GPU",
    "long-tail": "an epoch of long-tailed data: token streams, padding, packing",
    "max-length": "the longest sequence that fits a given memory",
    "memory": "bytes a token of an 8B model, without a GPU",
    "offload": "the time of a step with and without host offload",
    "overhead": "host time of a cell, and the share of a step that is spent in kernels",
    "pipeline": "bubbles and peak cells of pipelines, simulated",
    "plan": "the planner's choices for four models, and what is counted of them",
    "profile": "a trace of a step, its top kernels, and the gaps between them",
    "sharding": "gathers and bytes moved by a rank in a step, by engine",
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
