"""Which layer groups each stage of a pipeline has."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise


def cut_stages(
    group_costs: Sequence[float], num_stages: int, *, embedding_cost: float = 0.0, head_cost: float = 0.0
) -> tuple[range, ...]:
    """Consecutive groups for each stage, such that the costliest stage costs as little as it can.

    Among such cuts, the one with the most even stages (least sum of squares), then the one whose later stages
    have more groups.

    Args:
        group_costs: Costs of the layer groups, in one unit: FLOPs, seconds.
        embedding_cost: Cost of what the first stage has beside its groups.
        head_cost: Cost of what the last stage has beside its groups: final norm, output layer and loss.

    Raises:
        ValueError: fewer groups than stages, no stage, or a negative cost.
    """
    num_groups = len(group_costs)
    if num_stages < 1:
        raise ValueError(f"num_stages={num_stages}: write at least 1")
    if num_stages > num_groups:
        raise ValueError(
            f"num_stages={num_stages}, but the model has {num_groups} layer group(s), and a stage has at "
            f"least one: write at most {num_groups} stages, or a smaller layers_per_group"
        )
    if min(*group_costs, embedding_cost, head_cost) < 0:
        raise ValueError("a cost is negative: pass costs of at least 0")
    sums = [0.0, *accumulate(group_costs)]

    def cost(stage: int, start: int, end: int) -> float:
        own = sums[end] - sums[start]
        return own + embedding_cost * (stage == 0) + head_cost * (stage == num_stages - 1)

    least = _best_cut(cost, num_groups, num_stages, lambda so_far, own: max(so_far, own))[0]
    _, ends = _best_cut(
        cost, num_groups, num_stages, lambda so_far, own: so_far + own * own if own <= least else math.inf
    )
    return tuple(range(start, end) for start, end in pairwise(ends))


def _best_cut(
    cost: Callable[[int, int, int], float],
    num_groups: int,
    num_stages: int,
    add: Callable[[float, float], float],
) -> tuple[float, tuple[int, ...]]:
    """The least total over all cuts, and where the stages of such a cut end, from 0.

    Args:
        add: Takes the cost of one more stage into a total.
    """
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, (0,))}  # by groups that are in a stage already
    for stage in range(num_stages):
        last = num_groups - (num_stages - 1 - stage)
        ends = [last] if stage == num_stages - 1 else range(stage + 1, last + 1)
        best = {
            end: min(
                (add(total, cost(stage, start, end)), (*cut, end))
                for start, (total, cut) in best.items()
                if start < end
            )
            for end in ends
        }
    return best[num_groups]
