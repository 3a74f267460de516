"""How torch's caching allocator is set, by the environment."""

from __future__ import annotations

import os

VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""The second one is what it was called before; torch reads it still."""


def use_expandable_segments() -> None:
    """Before the first allocation: tensors of many sizes leave gaps between segments of fixed size. What the
    user has set stays."""
    if setting() is None:
        os.environ[VARIABLES[0]] = "expandable_segments:True"


def setting() -> str | None:
    """`None`: torch's own."""
    return next((os.environ[name] for name in VARIABLES if name in os.environ), None)
