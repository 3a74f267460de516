"""How ChunkFlow counts the bubbles of its example (arXiv 2503.02356, figures 2 and 6): sequences of 4, 2, 1
and 1 units in chunks of 2, so two chunks of one sequence and two alone, on four stages."""

from __future__ import annotations

from itertools import permutations

import pytest

from chunkdist.pipeline.schedule import Action, MicroBatch, PipelineSchedule
from chunkdist.pipeline.simulate import CellCosts, Timeline, simulate

LONG_0, LONG_1, SHORT, PACKED = range(4)
CHUNKS = (MicroBatch(0, 0, 1), MicroBatch(0, 1, 0), MicroBatch(1, 0, 0), MicroBatch(2, 0, 0))
WORK = 12
"""Forwards of a chunk that a stage must do; a backward takes two."""


def plain_1f1b(forwards: tuple[int, ...], backwards: tuple[int, ...], retained: int) -> Timeline:
    """1F1B as it is written for micro-batches that do not depend on each other, in a given order."""
    stages = []
    for stage in range(4):
        done = 3 - stage
        actions = [Action("F", index) for index in forwards[:done]]
        for index in backwards:
            end = min(4, max(done + 1, forwards.index(index) + 1))  # one, or as many as the backward needs
            actions += [Action("F", other) for other in forwards[done:end]]
            actions.append(Action("B", index))
            done = max(done, end)
        stages.append(tuple(actions))
    schedule = PipelineSchedule(micro_batches=CHUNKS, stages=tuple(stages), retained_chunks=(retained,) * 4)
    return simulate(schedule, CellCosts.uniform(schedule))


def every_order(retained: int) -> dict[tuple[tuple[int, ...], tuple[int, ...]], Timeline]:
    """Forwards of the long sequence ascending, its backwards descending."""
    return {
        (forwards, backwards): plain_1f1b(forwards, backwards, retained)
        for forwards in permutations(range(4))
        for backwards in permutations(range(4))
        if forwards.index(LONG_0) < forwards.index(LONG_1)
        and backwards.index(LONG_1) < backwards.index(LONG_0)
    }


def test_k_2_is_plain_1f1b_with_the_short_ones_first() -> None:
    found = plain_1f1b((SHORT, PACKED, LONG_0, LONG_1), (SHORT, PACKED, LONG_1, LONG_0), retained=2)
    assert found.duration == 23
    assert found.bubble_share == pytest.approx(0.478, abs=5e-4)
    orders = [order for order, found in every_order(2).items() if found.duration == 23]
    assert orders
    assert all(forwards[2:] == (LONG_0, LONG_1) for forwards, _ in orders)
    assert min(found.duration for found in every_order(2).values()) == 21, "ours"


def test_k_1_is_no_order_of_these_chunks() -> None:
    for found in every_order(1).values():
        for bubble in (found.bubble_share, 1 - WORK / found.duration):
            assert abs(bubble - 0.541) > 5e-4
