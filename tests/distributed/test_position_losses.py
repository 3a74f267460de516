"""Loss by position is that of all ranks, whatever they share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed
from transformers import AutoConfig

from chunkdist import ChunkConfig, chunk_model
from chunkdist.chunking import token_losses
from chunkdist.models.context_length import made_for
from tests.distributed.launched import arguments_of, save_initial_model, train
from tests.distributed.ranks import Ranks
from tests.helpers.models import batch, left_padded, packed_batch, padded_batch, tiny_llama
from tests.helpers.position_tables import OPTIONS, check_run, data_in, eval_loss
from tests.helpers.tiny_run import make_model_folder

CASES: dict[str, dict[str, Any]] = {
    "chunked": {"per_device_train_batch_size": 1},
    "plain": {"per_device_train_batch_size": 1, "chunk_method": "none"},
    "ZeRO-3, longer context": {"per_device_train_batch_size": 1, "context_length": 262144},
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
    engine = "zero3" if name.startswith("ZeRO-3") else "ddp"
    assert two_ranks.run(train, *arguments_of(engine, tmp_path, [], **values)) == [0, 0]
    saved = made_for(AutoConfig.from_pretrained(tmp_path / "out"))
    assert saved == values.get("context_length", 131072)
    at_first = eval_loss(model, 7, context_length=values.get("context_length"))
    check_run(tmp_path / "out", 7, first_eval_loss=at_first)


ROWS: dict[str, dict[str, Tensor]] = {
    "one row": batch(num_tokens=36),
    "packed": packed_batch([5, 1, 17, 13]),
    "right padding": padded_batch([36, 20, 3]),
    "left padding": left_padded([20, 36, 3]),
}


def losses_of(inputs: dict[str, Tensor], *, shares: bool) -> tuple[Tensor, Tensor]:
    """Losses and positions of the tokens of rows, or of this rank's part; 0 where there is no label."""
    model = tiny_llama(num_layers=2, dtype=torch.float32)
    chunk_model(
        model,
        ChunkConfig(chunk_size=8, attention="math"),
        sequence_group=distributed.group.WORLD if shares else None,
    )
    if shares:
        own = 36 // distributed.get_world_size()
        start = own * distributed.get_rank()
        inputs = {name: x[:, start : start + own] for name, x in inputs.items()}
    with token_losses(model) as found:
        model(**inputs, use_cache=False)
    (losses,) = found
    return losses.losses, losses.positions * losses.has_label


def parts_of_all() -> dict[str, tuple[list[Any], list[Any]]]:
    found = {name: losses_of(inputs, shares=True) for name, inputs in ROWS.items()}
    return {name: (losses.tolist(), positions.tolist()) for name, (losses, positions) in found.items()}


def test_positions_in_rows_that_ranks_share(two_ranks: Ranks) -> None:
    parts = two_ranks.run(parts_of_all)
    for name, inputs in ROWS.items():
        losses, positions = losses_of(inputs, shares=False)
        found = [torch.cat([torch.tensor(part[name][i]) for part in parts], 1) for i in (0, 1)]
        torch.testing.assert_close(found[0], losses, rtol=1e-4, atol=1e-5, msg=name)
        assert found[1].equal(positions), name
