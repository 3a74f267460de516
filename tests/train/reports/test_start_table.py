"""The rows of the table at the start."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from torch import nn

from chunkdist.train.reports.start_table import experts_rows


def model_of(implementation: str | None, *, has_experts: bool = True) -> nn.Module:
    model = nn.Module()
    model.config = SimpleNamespace(_experts_implementation=implementation)  # type: ignore[assignment]
    model.mlp = nn.ModuleDict({"experts" if has_experts else "up": nn.Linear(2, 2)})
    return model


@pytest.mark.parametrize(
    ("implementation", "has_experts", "capability", "is_said"),
    [
        ("grouped_mm", True, (8, 6), True),
        ("grouped_mm", True, (9, 0), False),
        ("batched_mm", True, (8, 0), False),
        ("grouped_mm", False, (8, 0), False),
        ("grouped_mm", True, None, False),
    ],
)
def test_waits_of_experts_are_said(
    implementation: str, has_experts: bool, capability: tuple[int, int] | None, is_said: bool
) -> None:
    rows = experts_rows(model_of(implementation, has_experts=has_experts), capability)
    assert bool(rows) is is_said
    if rows:
        assert "waits for the host 8 times a cell" in rows[0][2]
