"""The largest of some figures, of which one may be no number."""

from __future__ import annotations

import math
from collections.abc import Iterable


def largest(figures: Iterable[float]) -> float:
    """NaN if any is: `max` passes over one that is not the first."""
    found = list(figures)
    return math.nan if any(map(math.isnan, found)) else max(found)
