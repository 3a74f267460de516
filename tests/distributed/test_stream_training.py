"""Training on token streams with two ranks ends where it ends with one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.ranks import Ranks
from tests.distributed.stream_training import weights_before_and_after
from tests.helpers.tiny_run import make_model_folder


@pytest.mark.parametrize("values", [{}, {"max_length": 60, "retained_chunks": 1}])
def test_two_ranks_end_where_one_does(two_ranks: Ranks, tmp_path: Path, values: dict[str, Any]) -> None:
    """The second case needs several streams a rank, not as many on both."""
    model = make_model_folder(tmp_path / "model")
    start, end = map(torch.tensor, weights_before_and_after(model, values))
    assert (end - start).norm() > 1e-2
    for before, after in two_ranks.run(weights_before_and_after, model, values):
        assert torch.tensor(before).equal(start)
        assert (torch.tensor(after) - end).norm() < 1e-4 * (end - start).norm()
