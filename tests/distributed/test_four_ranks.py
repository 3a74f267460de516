"""Four ranks: the same gradients, and a quarter of weights, gradients and optimizer states on each.

The formula of the memory is in docs/sharding.md.
"""

from __future__ import annotations

import pytest

from tests.distributed.cases import CHUNK_SIZE, Case
from tests.distributed.memory import formula_and_count_of_zero3, held_by, model_for_memory
from tests.distributed.ranks import Ranks
from tests.distributed.test_gradients import check

LENGTHS = (CHUNK_SIZE, 10 * CHUNK_SIZE, 5 * CHUNK_SIZE + 2, 2)
CASES = {
    "ddp": Case(engine="ddp", layers_per_group="all", lengths=LENGTHS, ignored_rank=2),
    "fsdp2": Case(engine="fsdp2", layers_per_group=2, lengths=LENGTHS, num_micro_batches=2, lora=True),
    "zero2": Case(engine="zero2", layers_per_group="all", lengths=LENGTHS, num_micro_batches=3, lora=True),
    "zero3": Case(engine="zero3", lengths=LENGTHS, ignored_rank=2, max_grad_norm=0.05),
}


@pytest.mark.parametrize("name", CASES)
def test_gradients(four_ranks: Ranks, name: str) -> None:
    check(four_ranks, CASES[name])


def test_memory_shrinks_by_the_ranks_and_the_bound_of_the_chunks_stays(four_ranks: Ranks) -> None:
    lengths = (256, 512)
    model = model_for_memory()
    num_parameters = sum(p.numel() for p in model.parameters())
    layer_bytes = 4 * sum(p.numel() for p in model.model.layers[0].parameters())  # type: ignore[union-attr]
    alone = held_by("none", lengths)
    print("one rank", num_parameters, layer_bytes, alone)
    for engine, bytes_a_parameter in (("zero3", 20), ("fsdp2", 12)):
        for held in four_ranks.run(held_by, engine, lengths):
            print(engine, held)
            assert held.between_steps == pytest.approx(bytes_a_parameter * num_parameters / 4, rel=0.05)
            if engine == "fsdp2":  # ZeRO-3 holds them between steps, too
                assert held.after_backward == pytest.approx(4 * num_parameters / 4, rel=0.05)
            growth, growth_alone = (x.peaks[1] - x.peaks[0] for x in (held, alone))
            assert growth == pytest.approx(growth_alone, rel=0.02)
            beside_state = [x.peaks[1] - x.between_steps for x in (held, alone)]
            assert beside_state[0] <= beside_state[1] + 3 * layer_bytes


@pytest.mark.parametrize(("lora", "released"), [(False, False), (False, True), (True, False)])
def test_the_estimate_of_zero3_is_the_counted_peak(four_ranks: Ranks, lora: bool, released: bool) -> None:
    """Of FSDP2: tests/memory/test_sharded.py; with weights and optimizer on the host: test_offload.py."""
    for ((formula, counted),) in four_ranks.run(formula_and_count_of_zero3, lora, released, False):
        assert formula == pytest.approx(counted, rel=0.05)
