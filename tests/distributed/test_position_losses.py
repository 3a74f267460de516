"""Loss by position is that of all ranks, whatever they share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launched import arguments_of, save_initial_model, train
from tests.distributed.ranks import Ranks
from tests.helpers.position_tables import OPTIONS, check_run, data_in, eval_loss
from tests.helpers.tiny_run import make_model_folder

CASES: dict[str, dict[str, Any]] = {
    "chunked": {"per_device_train_batch_size": 1},
    "plain": {"per_device_train_batch_size": 1, "chunk_method": "none"},
    "shared rows": {"sequence_parallel_size": 2},
    "shared streams": {"sequence_parallel_size": 2, "chunk_packing": True},
}


@pytest.mark.parametrize("name", CASES)
def test_it_adds_up_to_the_loss(name: str, tmp_path: Path, two_ranks: Ranks) -> None:
    """Seven samples to evaluate in batches of three on two ranks: some come twice, and count once here (in
    transformers' mean of a batch they count as often as they come)."""
    model = make_model_folder(tmp_path / "model")
    save_initial_model(model)
    values = {**OPTIONS, "dataset_name": data_in(tmp_path / "data", 7), **CASES[name]}
    assert two_ranks.run(train, *arguments_of("ddp", tmp_path, [], **values)) == [0, 0]
    check_run(tmp_path / "out", 7, first_eval_loss=eval_loss(model, 7))
