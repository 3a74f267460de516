from __future__ import annotations

import random
from itertools import combinations, pairwise

import pytest

from chunkdist.pipeline.stage_cut import cut_stages


def test_no_cut_is_better() -> None:
    draw = random.Random(0)
    for _ in range(60):
        costs = [draw.randint(0, 9) for _ in range(draw.randint(1, 8))]
        count = draw.randint(1, len(costs))
        embedding, head = draw.randint(0, 9), draw.randint(0, 9)
        stages = cut_stages(costs, count, embedding_cost=embedding, head_cost=head)

        def value(cut: list[range]) -> tuple[float, float]:
            own = [sum(costs[group] for group in stage) for stage in cut]  # noqa: B023
            own[0] += embedding  # noqa: B023
            own[-1] += head  # noqa: B023
            return max(own), sum(x * x for x in own)

        every = [
            [range(*pair) for pair in pairwise((0, *borders, len(costs)))]
            for borders in combinations(range(1, len(costs)), count - 1)
        ]
        assert list(stages) in every
        assert value(list(stages)) == min(map(value, every))


def test_a_head_as_costly_as_two_layers_takes_their_place() -> None:
    assert [len(stage) for stage in cut_stages([1.0] * 30, 8, head_cost=2.0)] == [4] * 7 + [2]
    assert [len(stage) for stage in cut_stages([1.0] * 3, 3)] == [1, 1, 1]


def test_what_cannot_be_cut_is_refused() -> None:
    with pytest.raises(ValueError, match=r"num_stages=4, but the model has 3 layer group\(s\)"):
        cut_stages([1.0] * 3, 4)
    with pytest.raises(ValueError, match="num_stages=0"):
        cut_stages([1.0] * 3, 0)
    with pytest.raises(ValueError, match="a cost is negative"):
        cut_stages([1.0, -1.0], 1)
