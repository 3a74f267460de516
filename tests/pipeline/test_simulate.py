from __future__ import annotations

import pytest

from chunkdist.data.cost import SequenceCost
from chunkdist.data.long_tail import long_tailed_lengths
from chunkdist.pipeline.runs import pack_runs
from chunkdist.pipeline.schedule import Action, PipelineSchedule, schedule_1f1b
from chunkdist.pipeline.simulate import CellCosts, Timeline, simulate

EVEN_STAGES = 8


def _timeline(runs: list[int], retained: int = 1) -> Timeline:
    schedule = schedule_1f1b(runs, num_stages=4, retained_chunks=retained)
    return simulate(schedule, CellCosts.uniform(schedule))


def test_1f1b_has_the_bubbles_of_chunkflows_example() -> None:
    """Four sequences on four stages, backward twice the forward: of equal lengths, and of 4, 2, 1 and 1."""
    equal = _timeline([1] * 4)
    assert equal.duration == 21
    assert equal.bubble_share == pytest.approx(9 / 21)  # 42.9 %
    mixed = simulate(equal.schedule, CellCosts.uniform(equal.schedule, [4, 2, 1, 1]))
    assert mixed.duration == 56
    assert mixed.bubble_share == pytest.approx(32 / 56)  # 57.1 %


@pytest.mark.parametrize(("retained", "duration", "published"), [(1, 23, 0.541), (2, 21, 0.478)])
def test_chunks_of_two_beat_the_published_bubbles(retained: int, duration: float, published: float) -> None:
    """The same four sequences as chunks of 2, each 1 forward: even with reruns counted as bubble."""
    runs = [run.num_chunks for run in pack_runs([4, 2, 1, 1], 2)]
    found = _timeline(runs, retained)
    assert found.duration == duration
    assert found.bubble_share + found.rerun_share == pytest.approx(1 - 12 / duration)
    assert found.bubble_share + found.rerun_share < published
    assert found.rerun_share == pytest.approx((2 - retained) / duration)


def test_a_timeline_written_down() -> None:
    """Two stages, a run of two chunks of which the last is retained: the first is run again."""
    schedule = schedule_1f1b([2], num_stages=2, retained_chunks=1)
    costs = CellCosts(forward=((1, 2), (3, 4)), backward=((10, 20), (30, 40)))
    found = simulate(schedule, costs, transfer=0.5)
    assert [(span.start, span.rerun_end, span.end) for span in found.spans[0]] == [
        (0, 0, 1),
        (1, 1, 3),
        (49, 49, 69),
        (82, 83, 93),
    ]
    assert [(span.start, span.rerun_end, span.end) for span in found.spans[1]] == [
        (1.5, 1.5, 4.5),
        (4.5, 4.5, 8.5),
        (8.5, 8.5, 48.5),
        (48.5, 51.5, 81.5),
    ]
    assert found.duration == 93
    assert found.bubble_share == pytest.approx(1 - (34 + 80) / (2 * 93))
    assert found.rerun_share == pytest.approx(4 / (2 * 93))


def test_cells_cost_by_their_tokens_and_by_the_pairs_of_their_prefix() -> None:
    runs = pack_runs([5, 1, 2], 2)
    schedule = schedule_1f1b([run.num_chunks for run in runs], num_stages=2)
    stages = [
        SequenceCost(per_token=3.0, per_pair=((None, 30.0),)),
        SequenceCost(per_token=6.0, per_pair=((2, 3.0),)),
    ]
    costs = CellCosts.of_runs(schedule, runs, stages)
    # pairs: chunks of the sequence of 5 have 3, 7 and 5, and 1 of the other beside it; then one of 2
    assert costs.forward[0] == (2 + 30, 2 + 70, 2 + 60, 2 + 30)
    # in a window of 2, a token after the first of its sequence has 2 pairs
    assert costs.forward[1] == (4 + 3, 4 + 4, 4 + 3, 4 + 3)
    assert costs.backward[0] == tuple(2 * cost for cost in costs.forward[0])
    with_head = CellCosts.of_runs(schedule, runs, stages, head_per_token=50.0)
    assert with_head.forward == costs.forward
    assert with_head.backward[0] == costs.backward[0]
    assert with_head.backward[1] == tuple(100 + cost for cost in costs.backward[1])
    with pytest.raises(ValueError, match="costs of 1 stages for 2"):
        CellCosts.of_runs(schedule, runs, stages[:1])


def _long_tailed(chunk_size: int, **settings: int) -> list[Timeline]:
    """Every tenth batch of 256 sequences, at the cost of Llama-3-8B without its head, cut in equal stages."""
    lengths = long_tailed_lengths(100_000)
    cost = SequenceCost(
        per_token=6 * 218_103_808 * 32 / EVEN_STAGES, per_pair=((None, 12 * 4096 * 32 / EVEN_STAGES),)
    )
    found = []
    for start in range(0, len(lengths) - 255, 2560):
        runs = pack_runs(lengths[start : start + 256], chunk_size)
        schedule = schedule_1f1b([run.num_chunks for run in runs], num_stages=EVEN_STAGES, **settings)
        found.append(simulate(schedule, CellCosts.of_runs(schedule, runs, [cost] * EVEN_STAGES)))
    return found


def test_long_tailed_batches_have_a_bubble_below_15_percent() -> None:
    for settings in ({"retained_chunks": 4}, {"retained_chunks": 1, "forwards_ahead": 2}):
        found = _long_tailed(1024, **settings)
        assert len(found) == 39
        assert max(timeline.bubble_share for timeline in found) < 0.15


def test_stages_that_wait_for_each_other_are_found() -> None:
    schedule = schedule_1f1b([1, 1], num_stages=2)
    stuck = PipelineSchedule(
        micro_batches=schedule.micro_batches,
        stages=(schedule.stages[0], tuple(reversed(schedule.stages[1]))),
        retained_chunks=schedule.retained_chunks,
    )
    with pytest.raises(RuntimeError, match=r"stages wait for each other: .*1: Action\(kind='B'"):
        simulate(stuck, CellCosts.uniform(stuck))
    assert Action("B", 1) == stuck.stages[1][0]


def test_table() -> None:
    found = _timeline([2, 1, 1])
    lines = found.table().splitlines()
    assert len(lines) == 6
    assert lines[-1] == "4 micro-batches on 4 stages take 23: bubble 43.5%, reruns 4.3%"
    assert lines[1].split() == ["0", "52.2%", "4.3%", "43.5%", "3", "4"]


def test_costs_fit_the_schedule() -> None:
    schedule = schedule_1f1b([2], num_stages=2)
    with pytest.raises(ValueError, match="3 costs for 2 micro-batches"):
        CellCosts.uniform(schedule, [1, 2, 3])
