from __future__ import annotations

import random
from itertools import pairwise

import pytest
from torch.distributed.pipelining import schedules

from chunkdist.pipeline.schedule import Action, PipelineSchedule, schedule_1f1b


def _cases(count: int) -> list[tuple[list[int], int, int, int]]:
    draw = random.Random(0)
    return [
        (
            [draw.choice([1, 1, 1, 2, 3, 9, 14]) for _ in range(draw.randint(1, 12))],
            draw.randint(1, 8),
            draw.randint(0, 5),
            draw.randint(1, 3),
        )
        for _ in range(count)
    ]


def _schedule(case: tuple[list[int], int, int, int]) -> PipelineSchedule:
    runs, num_stages, retained, ahead = case
    return schedule_1f1b(runs, num_stages=num_stages, retained_chunks=retained, forwards_ahead=ahead)


@pytest.mark.parametrize("case", _cases(60), ids=str)
def test_every_cell_goes_forward_and_back_once_and_in_the_order_of_its_run(
    case: tuple[list[int], int, int, int],
) -> None:
    runs, num_stages, retained, _ = case
    schedule = _schedule(case)
    chunks = [(batch.run, batch.chunk) for batch in schedule.micro_batches]
    assert sorted(chunks) == [(run, chunk) for run, length in enumerate(runs) for chunk in range(length)]
    assert [schedule.is_retained(0, index) for index in range(len(schedule.micro_batches))] == [
        chunk >= runs[run] - retained for run, chunk in chunks
    ]
    assert len(schedule.stages) == num_stages
    every = {Action(kind, index) for kind in ("F", "B") for index in range(len(chunks))}  # type: ignore[arg-type]
    for actions in schedule.stages:
        assert len(actions) == len(every)
        assert set(actions) == every
        place = {action: position for position, action in enumerate(actions)}
        for index in range(len(chunks)):
            assert place[Action("F", index)] < place[Action("B", index)]
        for index, following in pairwise(range(len(chunks))):
            assert place[Action("F", index)] < place[Action("F", following)]
            if chunks[index][0] == chunks[following][0]:
                assert chunks[index][1] + 1 == chunks[following][1]
                assert place[Action("B", index)] > place[Action("B", following)]


@pytest.mark.parametrize("case", _cases(60), ids=str)
def test_graphs_alive_are_bounded_whatever_the_lengths_of_runs(case: tuple[list[int], int, int, int]) -> None:
    runs, num_stages, retained, ahead = case
    schedule = _schedule(case)
    for stage, (graphs, inputs) in enumerate(
        zip(schedule.peak_graphs(), schedule.peak_inputs(), strict=True)
    ):
        lead = ahead * (num_stages - 1 - stage)
        assert graphs <= (max(1, retained) + lead if retained else 1)
        assert max(runs) <= inputs <= max(runs) + lead


def test_a_longer_run_needs_no_more_graphs() -> None:
    four, many = (
        schedule_1f1b([length, 1, 1, 1, 1, 1, 1], num_stages=4, retained_chunks=2) for length in (4, 64)
    )
    assert four.peak_graphs() == many.peak_graphs() == (5, 4, 3, 2)


def test_peaks_are_those_of_a_schedule_written_down() -> None:
    """Three chunks, the last one retained: while the second is run again, no other graph is there."""
    schedule = schedule_1f1b([3, 1], num_stages=1, retained_chunks=1)
    assert " ".join(schedule.rows()[0]) == "0F0 0F1 0F2 0B2 0B1 0B0 0F3 0B3"
    assert schedule.peak_graphs() == (1,)
    assert schedule.peak_inputs() == (3,)
    nothing = schedule_1f1b([3, 1], num_stages=1, retained_chunks=0)
    assert nothing.peak_graphs() == (1,)
    everything = schedule_1f1b([3, 1], num_stages=1, retained_chunks=3)
    assert everything.peak_graphs() == (3,)


def test_runs_of_one_chunk_are_1f1b() -> None:
    schedule = schedule_1f1b([1] * 6, num_stages=4)
    rows = schedule.rows()
    assert " ".join(rows[0]) == "0F0 0F1 0F2 0F3 0B0 0F4 0B1 0F5 0B2 0B3 0B4 0B5"
    assert " ".join(rows[3]) == "3F0 3B0 3F1 3B1 3F2 3B2 3F3 3B3 3F4 3B4 3F5 3B5"


def test_one_run_goes_back_while_the_next_goes_forward() -> None:
    rows = schedule_1f1b([3, 2, 1], num_stages=2).rows()
    assert " ".join(rows[1]) == "1F0 1F1 1F2 1B2 1B1 1F3 1B0 1F4 1B4 1B3 1F5 1B5"
    assert " ".join(rows[0]) == "0F0 0F1 0F2 0F3 0B2 0B1 0F4 0B0 0F5 0B4 0B3 0B5"


@pytest.mark.parametrize("case", _cases(20), ids=str)
def test_torch_adds_sends_and_receives_and_nobody_waits_forever(
    case: tuple[list[int], int, int, int],
) -> None:
    schedule = _schedule(case)
    actions = {
        stage: [schedules._Action.from_str(name) for name in row] for stage, row in enumerate(schedule.rows())
    }
    count, num_batches = schedule.num_stages, len(schedule.micro_batches)
    schedules._validate_schedule(actions, count, count, num_batches)  # type: ignore[arg-type]
    with_comms = schedules._add_send_recv(actions, lambda stage: stage, count)  # type: ignore[arg-type]
    run = schedules._simulate_comms_compute(with_comms, lambda stage: stage, count)  # type: ignore[arg-type]
    sends = [action for row in with_comms.values() for action in row if "SEND" in str(action)]
    assert len(sends) == 2 * num_batches * (count - 1)
    assert {stage: [a for a in row if a is not None] for stage, row in run.items()} == with_comms


@pytest.mark.parametrize(
    ("runs", "settings", "message"),
    [
        ([], {}, "at least one run"),
        ([2, 0], {}, "no run without chunks"),
        ([2], {"num_stages": 0}, "num_stages=0: write at least 1"),
        ([2], {"retained_chunks": -1}, "retained_chunks=-1: write at least 0"),
        ([2], {"forwards_ahead": 0}, "forwards_ahead=0: write at least 1"),
    ],
)
def test_what_is_no_schedule_is_refused(runs: list[int], settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        schedule_1f1b(runs, **{"num_stages": 2, **settings})


def test_each_stage_may_retain_another_number() -> None:
    schedule = schedule_1f1b([4], num_stages=2, retained_chunks=(3, 1))
    kept = [[schedule.is_retained(stage, index) for index in range(4)] for stage in range(2)]
    assert kept == [[False, True, True, True], [False, False, False, True]]
    assert schedule.peak_graphs() == (3, 1)
    with pytest.raises(ValueError, match=r"retained_chunks=\(1,\) for 2 stages"):
        schedule_1f1b([4], num_stages=2, retained_chunks=(1,))
