"""Loss by position: the mean loss of tokens by their position in their own sequence.

Where a model uses what is far away, tokens late in a sequence have a lower loss than without it. One mean
over all tokens hides that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from chunkdist.loss.token_losses import TokenLosses

_FIRST_END, _NUM_ENDS = 64, 17
ENDS = tuple(_FIRST_END * 2**i for i in range(_NUM_ENDS))
"""Ends of the ranges of positions that sums are kept for; the last range has none."""
Table = list[list[float]]
"""A row for each range that has tokens: first position, end, mean loss, number of tokens."""
LOGGED = (0, *(2**i for i in range(10, 23, 2)))
"""Starts of the ranges that are logged, which are unions of those."""


class PositionSums:
    """Sums of one rank, on its device until they are taken."""

    def __init__(self) -> None:
        self.sums: Tensor | None = None
        """(2, ranges) in fp64: losses, and numbers of tokens. Never written to."""

    @torch.no_grad()
    def add(self, found: TokenLosses) -> None:
        """Adds the tokens of one forward. Waits for nothing."""
        device, has_label = found.losses.device, found.has_label
        ends = _FIRST_END * 2 ** torch.arange(_NUM_ENDS, device=device)
        ranges_N = torch.bucketize(found.positions.reshape(-1), ends, right=True)
        values_2N = torch.stack([found.losses.double().where(has_label, 0), has_label.double()]).flatten(1)
        sums = values_2N.new_zeros(2, _NUM_ENDS + 1).index_add_(1, ranges_N, values_2N)
        self.sums = sums if self.sums is None else self.sums + sums

    def take(self, device: torch.device) -> Tensor:
        """The sums since the last call, on `device`."""
        sums, self.sums = self.sums, None
        if sums is None:
            return torch.zeros(2, _NUM_ENDS + 1, dtype=torch.float64, device=device)
        return sums.to(device)


@dataclass(frozen=True, kw_only=True)
class LossByPosition:
    """What `PositionSums` comes to.

    Args:
        losses: Sums, by range of positions.
        num_tokens: How many tokens have been summed, likewise.
    """

    losses: Sequence[float]
    num_tokens: Sequence[int]

    @classmethod
    def of(cls, sums: Tensor) -> LossByPosition:
        """Waits for the device."""
        losses, counts = sums.tolist()
        return cls(losses=losses, num_tokens=[round(count) for count in counts])

    def table(self) -> Table:
        """By range of positions. The last range's end is twice its start."""
        ends = (*ENDS, 2 * ENDS[-1])
        return [
            [start, end, loss / count, count]
            for (start, end), loss, count in zip(
                pairwise((0, *ends)), self.losses, self.num_tokens, strict=True
            )
            if count
        ]

    def means(self) -> dict[str, float]:
        """Mean losses of the ranges that are logged, by their names: `"0-1K"`, `"1-4K"`, ... Those without
        tokens are left out."""
        found, table = {}, self.table()
        for start, end in zip(LOGGED, (*LOGGED[1:], math.inf), strict=True):
            rows = [row for row in table if start <= row[0] < end]
            count = sum(row[3] for row in rows)
            if count:
                found[range_name(start, end)] = sum(row[2] * row[3] for row in rows) / count
        return found


NOTHING = LossByPosition(losses=(0.0,) * (_NUM_ENDS + 1), num_tokens=(0,) * (_NUM_ENDS + 1))
"""No token at any position."""


def mean_table(tables: Sequence[Table]) -> Table:
    """The table of all tokens of several tables. Rows whose loss is `None` (no number) are left out."""
    found: dict[float, list[float]] = {}
    for start, end, loss, count in (row for table in tables for row in table if row[2] is not None):
        before = found.get(start, [start, end, 0.0, 0])
        total = before[3] + count
        found[start] = [start, end, before[2] + (loss - before[2]) * count / total, total]
    return [found[start] for start in sorted(found)]


def range_name(start: int, end: float) -> str:
    """`"1-4K"`, `"256K-1M"`; without an end, `"4M-"`."""
    if end == math.inf:
        return f"{short_number(start)}-"
    first, last = short_number(start), short_number(int(end))
    return f"{first.rstrip('KM') if first[-1] == last[-1] else first}-{last}"


def short_number(number: int) -> str:
    """`"4K"` for 4,096."""
    for size, unit in ((2**20, "M"), (2**10, "K")):
        if number >= size:
            return f"{number // size}{unit}"
    return str(number)
