"""Parts of rows add up to the rows, and each has the labels that it predicts."""

from __future__ import annotations

import pytest
import torch

from chunkdist.data.row_parts import PartCollator, RowParts


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
def test_parts_are_the_rows(num_ranks: int) -> None:
    ids = torch.arange(1, 15).view(2, 7)
    rows = {
        "input_ids": ids,
        "labels": ids.clone(),
        "position_ids": torch.arange(7).expand(2, 7),
        "names": ["a"],
    }
    collators = [
        PartCollator(lambda _: rows, RowParts(num_ranks=num_ranks, rank=r)) for r in range(num_ranks)
    ]
    parts = [collator(None) for collator in collators]
    assert len({part["input_ids"].shape for part in parts}) == 1
    whole = {name: torch.cat([part[name] for part in parts], 1) for name in parts[0] if name != "names"}
    assert all(part["names"] == ["a"] for part in parts)
    assert whole["input_ids"].shape[1] == -(-7 // num_ranks) * num_ranks
    assert torch.equal(whole["input_ids"][:, :7], ids)
    assert torch.equal(whole["shift_labels"][:, :6], ids[:, 1:])
    assert (whole["shift_labels"][:, 6:] == -100).all()
    assert (whole["labels"][:, 7:] == -100).all()
    assert (whole["input_ids"][:, 7:] == 0).all()
