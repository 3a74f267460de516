"""Rewards for launchers/grpo.py: `reward_funcs: [configs/rewards.py:printable]`."""

from __future__ import annotations

from typing import Any


def printable(completions: list[str], **columns: Any) -> list[float]:
    """The share of a completion's characters that are plain text."""
    return [sum(x.isascii() and x.isprintable() for x in text) / max(1, len(text)) for text in completions]
