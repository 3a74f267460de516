"""How far results of pieces of tokens are from those of all of them, token by token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from chunkdist.engine.token_pieces import joined, matched, result_dims, tensors_of

_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-5}
_HALF_TOLERANCE = 2e-3
"""Bound, relative to a token's norm. Rounding of bf16 itself does not count: both ways round the same sums,
but for a few."""


def error_of_pieces(expected: Any, pieces: list[Any]) -> float:
    """In units of the tolerance, of the results of pieces against that of the whole."""
    if len({len(tensors_of(piece)) for piece in pieces}) > 1:
        return float("inf")
    found = joined(pieces, result_dims(expected, pieces))
    return largest_error(tensors_of(expected), tensors_of(found))


def error_of_row(expected: Any, found: Any, factor: float) -> float:
    """In units of the tolerance, of what was made of repeated tokens, against what was made of them once."""
    before, after = tensors_of(expected), tensors_of(found)
    if len(before) != len(after):
        return float("inf")
    pairs = (pair for a, b in zip(before, after, strict=True) for pair in matched(a, b, factor))
    return max((largest_error([a], [b]) for a, b in pairs), default=0.0)


def largest_error(expected: list[Tensor], found: list[Tensor]) -> float:
    """In units of the tolerance, of the worst token."""
    worst = 0.0 if len(expected) == len(found) else float("inf")
    for a, b in zip(expected, found, strict=False):
        if a.shape != b.shape:
            return float("inf")
        if torch.equal(a, b) or a.ndim == 0:
            continue
        is_narrow = a.device.type != "cpu" and a.dtype == torch.float32  # TF32
        tolerance = _HALF_TOLERANCE if is_narrow else _TOLERANCES.get(a.dtype, _HALF_TOLERANCE)
        difference, norm = (x.double().norm(dim=-1) for x in (a - b, a))
        ratio = (difference / (tolerance * (norm + 1e-3 * norm.max()) + 1e-300)).max().item()
        worst = max(worst, ratio if ratio == ratio else float("inf"))
    return worst
