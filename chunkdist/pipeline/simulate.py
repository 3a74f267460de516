"""When each stage of a pipeline runs which cell, from the costs of cells alone: no tensor is made.

A stage runs its actions in their order, each as soon as what it needs is there: a forward needs the stage
before, a backward the stage after. Sends take no time of a stage; they may delay the receiver (`transfer`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from chunkdist.data.cost import SequenceCost
from chunkdist.models.flops import num_pairs
from chunkdist.pipeline.runs import Run
from chunkdist.pipeline.schedule import Action, PipelineSchedule


@dataclass(frozen=True, kw_only=True)
class CellCosts:
    """By stage and micro-batch, in the schedule's order, what a cell takes; in one unit: seconds, FLOPs.

    A rerun takes as long as the forward, on top of the backward.
    """

    forward: tuple[tuple[float, ...], ...]
    backward: tuple[tuple[float, ...], ...]

    @classmethod
    def uniform(
        cls,
        schedule: PipelineSchedule,
        forward: float | Sequence[float] = 1.0,
        *,
        backward_ratio: float = 2.0,
    ) -> CellCosts:
        """Equal costs on all stages, for all micro-batches or for each."""
        count = len(schedule.micro_batches)
        each = tuple(forward) if isinstance(forward, Sequence) else (forward,) * count
        if len(each) != count:
            raise ValueError(f"{len(each)} costs for {count} micro-batches: pass one of each, or one of all")
        return cls(
            forward=(each,) * schedule.num_stages,
            backward=(tuple(backward_ratio * cost for cost in each),) * schedule.num_stages,
        )

    @classmethod
    def of_runs(
        cls,
        schedule: PipelineSchedule,
        runs: Sequence[Run],
        stages: Sequence[SequenceCost],
        *,
        head_per_token: float = 0.0,
        backward_ratio: float = 2.0,
    ) -> CellCosts:
        """From what a token and a pair of positions cost on each stage, forward and backward together.

        Slots without a token cost what a token costs.

        Args:
            runs: What the schedule was made of.
            stages: Without the output layer.
            head_per_token: Cost of the output layer: it runs in the backwards of the last stage, and never
                again.
        """
        if len(stages) != schedule.num_stages:
            raise ValueError(f"costs of {len(stages)} stages for {schedule.num_stages}: pass one of each")
        spans = [_spans(run) for run in runs]
        by_stage = {
            stage: tuple(
                _chunk_cost(stage, runs[batch.run].chunk_size, spans[batch.run][batch.chunk])
                / (1 + backward_ratio)
                for batch in schedule.micro_batches
            )
            for stage in dict.fromkeys(stages)  # stages that are alike are computed once
        }
        forward = tuple(by_stage[stage] for stage in stages)
        head = [head_per_token * runs[batch.run].chunk_size for batch in schedule.micro_batches]
        backward = [tuple(backward_ratio * cost for cost in costs) for costs in forward]
        backward[-1] = tuple(cost + own for cost, own in zip(backward[-1], head, strict=True))
        return cls(forward=forward, backward=tuple(backward))


@dataclass(frozen=True)
class Span:
    """One action; of a backward, from `start` to `rerun_end` the cell is run again."""

    action: Action
    start: float
    rerun_end: float
    end: float


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """What a simulation found, in the unit of the costs."""

    schedule: PipelineSchedule
    spans: tuple[tuple[Span, ...], ...]

    @property
    def duration(self) -> float:
        return max(stage[-1].end for stage in self.spans)

    @property
    def bubble_share(self) -> float:
        """The share of the time of all stages in which they wait."""
        busy = sum(span.end - span.start for stage in self.spans for span in stage)
        return 1 - busy / (self.duration * len(self.spans))

    @property
    def rerun_share(self) -> float:
        """The share of the time of all stages in which cells run again."""
        rerun = sum(span.rerun_end - span.start for stage in self.spans for span in stage if _is_back(span))
        return rerun / (self.duration * len(self.spans))

    def table(self) -> str:
        """What each stage does and holds, for people to read."""
        duration, count = self.duration, len(self.spans)
        lines = [f"{'stage':>5}{'busy':>9}{'reruns':>9}{'waits':>9}{'graphs':>8}{'inputs':>8}"]
        peaks = zip(self.schedule.peak_graphs(), self.schedule.peak_inputs(), strict=True)
        for number, (stage, (graphs, inputs)) in enumerate(zip(self.spans, peaks, strict=True)):
            busy = sum(span.end - span.start for span in stage) / duration
            rerun = sum(span.rerun_end - span.start for span in stage if _is_back(span)) / duration
            lines.append(f"{number:5}{busy - rerun:9.1%}{rerun:9.1%}{1 - busy:9.1%}{graphs:8}{inputs:8}")
        lines.append(
            f"{len(self.schedule.micro_batches)} micro-batches on {count} stages take {duration:,.4g}: "
            f"bubble {self.bubble_share:.1%}, reruns {self.rerun_share:.1%}"
        )
        return "\n".join(lines)


def simulate(schedule: PipelineSchedule, costs: CellCosts, *, transfer: float = 0.0) -> Timeline:
    """The timeline of a schedule.

    Args:
        transfer: How long hidden states, or their gradients, are on their way from stage to stage.

    Raises:
        RuntimeError: stages wait for each other, in a schedule made by hand.
    """
    count = schedule.num_stages
    ends: list[dict[Action, float]] = [{} for _ in range(count)]
    spans: list[list[Span]] = [[] for _ in range(count)]
    moved = True
    while moved:
        moved = False
        for stage, actions in enumerate(schedule.stages):
            own = spans[stage]
            while len(own) < len(actions):
                action = actions[len(own)]
                ready = _ready(ends, stage, action, transfer)
                if ready is None:
                    break
                start = max(own[-1].end if own else 0.0, ready)
                rerun_end, index = start, action.micro_batch
                if action.kind == "F":
                    end = start + costs.forward[stage][index]
                else:
                    if not schedule.is_retained(stage, index):
                        rerun_end += costs.forward[stage][index]
                    end = rerun_end + costs.backward[stage][index]
                ends[stage][action] = end
                own.append(Span(action, start, rerun_end, end))
                moved = True
    waiting = {
        stage: actions[len(spans[stage])]
        for stage, actions in enumerate(schedule.stages)
        if len(spans[stage]) < len(actions)
    }
    if waiting:
        raise RuntimeError(f"stages wait for each other: {waiting}")
    return Timeline(schedule=schedule, spans=tuple(tuple(stage) for stage in spans))


def _ready(ends: Sequence[dict[Action, float]], stage: int, action: Action, transfer: float) -> float | None:
    """When what the action needs of other stages is there, or of its own forward; `None`: not known yet."""
    if action.kind == "F":
        if stage == 0:
            return 0.0
        neighbour = ends[stage - 1].get(action)
    else:
        if Action("F", action.micro_batch) not in ends[stage]:
            return None
        if stage == len(ends) - 1:
            return 0.0
        neighbour = ends[stage + 1].get(action)
    return None if neighbour is None else neighbour + transfer


def _is_back(span: Span) -> bool:
    return span.action.kind == "B"


def _spans(run: Run) -> list[list[tuple[int, int]]]:
    """By chunk, from where to where it goes in each of its sequences."""
    stream = run.stream()
    (starts,) = stream.segment_starts
    segments = list(zip(starts, (*starts[1:], stream.num_tokens), strict=True))
    return [
        [
            (max(start, chunk.start) - start, min(end, chunk.end) - start)
            for start, end in segments
            if start < chunk.end and chunk.start < end
        ]
        for chunk in stream.chunks
    ]


def _chunk_cost(cost: SequenceCost, chunk_size: int, spans: Sequence[tuple[int, int]]) -> float:
    pairs = sum(
        per_pair * (num_pairs(end, window) - num_pairs(start, window))
        for window, per_pair in cost.per_pair
        for start, end in spans
    )
    return cost.per_token * chunk_size + pairs
