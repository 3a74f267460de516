"""What a stage holds is what the schedule says, in live bytes of real steps."""

from __future__ import annotations

from dataclasses import replace

import pytest

from chunkdist.pipeline.schedule import schedule_1f1b
from tests.distributed.ranks import Ranks
from tests.pipeline.pipeline_steps import PipelineCase, peak_buffers, peak_bytes

WIDE, NARROW = 4096, 2048
# a wide MLP and few weights to train: a graph is most of what a cell has, and gradients are little beside it
ONE = PipelineCase(lengths=(32,), num_layers=2, intermediate_size=WIDE, lora=True, lora_targets=("q_proj",))
SHORT = replace(ONE, lengths=(8,) * 6)
CASES = [
    ONE,
    replace(ONE, retained_chunks=3),
    replace(ONE, lengths=(512,)),
    SHORT,
    replace(SHORT, forwards_ahead=3),
    replace(ONE, intermediate_size=NARROW),
    replace(ONE, intermediate_size=NARROW, lengths=(512,)),
]


def test_graphs_are_held_as_the_schedule_says(two_ranks: Ranks) -> None:
    schedules = [
        schedule_1f1b(
            [-(-length // case.chunk_size) for length in case.lengths],
            num_stages=2,
            retained_chunks=case.retained_chunks,
            forwards_ahead=case.forwards_ahead,
        )
        for case in CASES
    ]
    graphs = [schedule.peak_graphs() for schedule in schedules]
    assert graphs == [(1, 1), (3, 3), (1, 1), (2, 1), (4, 1), (1, 1), (1, 1)]
    for stage, peaks in enumerate(two_ranks.run(peak_bytes, CASES)):
        one, three, long, short, ahead, narrow, long_narrow = peaks
        graph = (three - one) / 2
        assert graph > 3 * 8 * WIDE * 8, "an MLP alone keeps three tensors of its width"
        assert ahead - short == pytest.approx((graphs[4][stage] - graphs[3][stage]) * graph, abs=0.15 * graph)
        # 64 chunks hold as many graphs as 4: only these know how wide the MLP is
        assert one - narrow > 0.4 * graph
        assert long - long_narrow <= one - narrow + 0.1 * graph


def test_what_is_received_has_memory_only_until_it_is_used(two_ranks: Ranks) -> None:
    """Of 64 chunks."""
    assert max(two_ranks.run(peak_buffers, replace(ONE, lengths=(512,)))) <= 2
