"""Out of memory on one of two ranks: nobody waits, and the step that runs again is exact."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.cases import CHUNK_SIZE, Case
from tests.distributed.ranks import Ranks
from tests.distributed.shrinking import largest_error_of_retry, weights_and_chunk_size
from tests.helpers.planted_memory import Place
from tests.helpers.tiny_run import make_model_folder

LENGTHS = (3 * CHUNK_SIZE, 5 * CHUNK_SIZE + 2)


@pytest.mark.parametrize(
    ("case", "place"),
    [
        (Case(engine="ddp", lengths=LENGTHS), "backward"),
        (Case(engine="fsdp2", lengths=LENGTHS), "forward"),
        (Case(engine="fsdp2", lengths=LENGTHS, layers_per_group=2, lora=True), "backward"),
        (Case(engine="fsdp2", lengths=LENGTHS, layers_per_group="all"), "loss"),
        (Case(engine="fsdp2 head", lengths=LENGTHS, retained_chunks=1), "loss"),
    ],
    ids=lambda x: x if isinstance(x, str) else x.engine,
)
def test_gradients(two_ranks: Ranks, case: Case, place: Place) -> None:
    assert max(two_ranks.run(largest_error_of_retry, case, place)) < 1e-10


def test_the_trainer_shrinks_on_both_ranks_and_loses_nothing(two_ranks: Ranks, tmp_path: Path) -> None:
    model = make_model_folder(tmp_path / "model")
    values = {"oom": "shrink", "chunk_size": 128, "max_length": 256, "gradient_accumulation_steps": 2}
    runs = [two_ranks.run(weights_and_chunk_size, model, rank, values) for rank in (1, -1)]
    (first, second), (untouched, _) = runs
    assert first[2] == untouched[2]
    assert first[0] == second[0]
    assert [size for _, size, _ in (first, second, untouched)] == [64, 64, 128]
    assert first[0] == pytest.approx(untouched[0], abs=1e-6)
