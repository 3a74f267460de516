"""Whether it pays that a rank has several stages of a pipeline (interleaved stages), by simulation.

Rank r of P has the stages r, r + P, ... Each stage has the actions of `schedule_1f1b` in their order, as if
it had a rank of its own; a rank does first what is ready first, and of that the backwards, then the later
stages. So all that a stage may have alive at a time stays bounded as before.
"""

from __future__ import annotations

from dataclasses import dataclass

from chunkdist.pipeline.schedule import Action, PipelineSchedule
from chunkdist.pipeline.simulate import CellCosts


@dataclass(frozen=True, kw_only=True)
class RankTimeline:
    """What a simulation found, in the unit of the costs.

    Args:
        busy: Of all ranks, reruns included.
        graphs: By rank, sums of its stages' peaks.
    """

    duration: float
    busy: float
    graphs: tuple[int, ...]

    @property
    def bubble_share(self) -> float:
        return 1 - self.busy / (self.duration * len(self.graphs))


def simulate_ranks(schedule: PipelineSchedule, costs: CellCosts, num_ranks: int) -> RankTimeline:
    """A schedule of as many stages as `num_ranks` times the stages of a rank."""
    count = schedule.num_stages
    ends: list[dict[Action, float]] = [{} for _ in range(count)]
    done, free = [0] * count, [0.0] * num_ranks
    busy = 0.0
    heads: dict[int, tuple[float, Action]] = {}

    def look(stage: int) -> None:
        """Notes when what the next action of a stage needs is there, once that is known."""
        if stage in heads or not 0 <= stage < count or done[stage] == len(schedule.stages[stage]):
            return
        action = schedule.stages[stage][done[stage]]
        before = stage - 1 if action.kind == "F" else stage + 1
        if not 0 <= before < count:
            heads[stage] = 0.0, action
        elif action in ends[before]:
            heads[stage] = ends[before][action], action

    for stage in range(count):
        look(stage)
    while heads:
        stage = min(
            heads,
            key=lambda s: (max(heads[s][0], free[s % num_ranks]), heads[s][1].kind == "F", -s),
        )
        ready, action = heads.pop(stage)
        cost = costs.forward[stage][action.micro_batch]
        if action.kind == "B":
            rerun = 0.0 if schedule.is_retained(stage, action.micro_batch) else cost
            cost = rerun + costs.backward[stage][action.micro_batch]
        start = max(ready, free[stage % num_ranks])
        ends[stage][action] = free[stage % num_ranks] = start + cost
        busy += cost
        done[stage] += 1
        for neighbour in (stage - 1, stage, stage + 1):
            look(neighbour)
    peaks = schedule.peak_graphs()
    graphs = tuple(sum(peaks[rank::num_ranks]) for rank in range(num_ranks))
    return RankTimeline(duration=max(free), busy=busy, graphs=graphs)
