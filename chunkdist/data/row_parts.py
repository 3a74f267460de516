"""The part of rows that one rank of a sequence group trains on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from chunkdist.data.streams import NO_LABEL


@dataclass(frozen=True, kw_only=True)
class RowParts:
    """Cuts rows into contiguous, equal parts.

    Args:
        num_ranks: Ranks of a group.
        rank: Which of them this one is.
    """

    num_ranks: int
    rank: int

    def part(self, rows: Mapping[str, Any]) -> dict[str, Any]:
        """This rank's part of rows (B, T), padded on the right to a multiple of the ranks.

        `shift_labels` are added: the labels at the token before, also where that is of another part. What has
        no dim of tokens stays as it is.
        """
        shape = rows["input_ids"].shape
        padding = -shape[1] % self.num_ranks
        num_own = (shape[1] + padding) // self.num_ranks
        own = slice(self.rank * num_own, (self.rank + 1) * num_own)
        parts = dict(rows)
        if "labels" in rows:
            parts["shift_labels"] = F.pad(rows["labels"][:, 1:], (0, 1), value=NO_LABEL)
        for name, x in parts.items():
            if isinstance(x, Tensor) and x.shape == shape:
                value = NO_LABEL if name in ("labels", "shift_labels") else 0
                parts[name] = F.pad(x, (0, padding), value=value)[:, own].contiguous()
        return parts


@dataclass(frozen=True)
class PartCollator:
    """Another collator's batches, of which each is cut to this rank's part."""

    collate: Callable[[Any], Mapping[str, Any]]
    parts: RowParts

    def __call__(self, samples: Any) -> dict[str, Any]:
        return self.parts.part(self.collate(samples))
