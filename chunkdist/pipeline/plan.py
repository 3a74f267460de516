"""Chooses how a pipeline trains on given batches: chunk size, cut, retained chunks of each stage, and how far
stages are ahead of each other. What is compared is simulated; no tensor is made.

Whole layers, and an output layer that costs as much as some of them, seldom make stages of equal cost. What
can be shared out more finely are reruns: a stage with a layer more retains more chunks, and runs fewer again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from chunkdist.data.cost import SequenceCost
from chunkdist.pipeline.runs import Run, pack_runs
from chunkdist.pipeline.schedule import PipelineSchedule, schedule_1f1b
from chunkdist.pipeline.simulate import CellCosts, Timeline, simulate
from chunkdist.pipeline.stage_cut import cut_stages

_HEAD_WEIGHTS = (0.5, 0.75, 1.0, 1.5)
"""Layers run again and the output layer does not: which part of its cost balances best depends on reruns."""


CHUNK_SIZES, RETAINED_CHUNKS, FORWARDS_AHEAD = (512, 1024, 2048), (0, 1, 4), (1, 2, 4)
"""What is compared where nothing is set."""


@dataclass(frozen=True, kw_only=True)
class PipelinePlan:
    """What `Pipeline` takes, and what the simulation says of it, over all batches.

    Args:
        stages: The layers of each.
        retained_chunks: By stage.
        duration: In the unit of the costs.
        bubble_share: The share of the time of all stages in which they wait.
        rerun_share: The part in which cells run again.
        peak_graphs: By stage, cells that have a graph at a time.
    """

    chunk_size: int
    stages: tuple[range, ...]
    retained_chunks: tuple[int, ...]
    forwards_ahead: int
    duration: float
    bubble_share: float
    rerun_share: float
    peak_graphs: tuple[int, ...]


def tried_cuts(
    batches: Sequence[Sequence[int]],
    layers: Sequence[SequenceCost],
    *,
    num_stages: int,
    head_per_token: float,
) -> list[tuple[range, ...]]:
    """The cuts into stages of whole layers that `choose_pipeline` compares; arguments as there."""
    lengths = [length for batch in batches for length in batch]
    of_kind = {layer: sum(map(layer, lengths)) / sum(lengths) for layer in set(layers)}
    costs = [of_kind[layer] for layer in layers]
    weights = [weight * head_per_token for weight in _HEAD_WEIGHTS]
    return list(dict.fromkeys(cut_stages(costs, num_stages, head_cost=weight) for weight in weights))


def choose_pipeline(
    batches: Sequence[Sequence[int]],
    layers: Sequence[SequenceCost],
    *,
    num_stages: int,
    head_per_token: float,
    max_graph_tokens: int | None,
    chunk_sizes: Sequence[int] = CHUNK_SIZES,
    retained_chunks: Sequence[int] = RETAINED_CHUNKS,
    forwards_ahead: Sequence[int] = FORWARDS_AHEAD,
    shares_reruns: bool = True,
    shares_chunks: bool = True,
) -> PipelinePlan:
    """The plan that takes the least time.

    Args:
        batches: Tokens of the sequences of some optimizer steps.
        layers: What each layer costs, forward and backward together.
        head_per_token: Cost of the output layer, in the same unit.
        max_graph_tokens: Tokens times layers of which one stage may hold graphs: bytes to spare, by the bytes
            of a layer's activations of a token. `None`: memory is not looked at.
        retained_chunks: To begin with.
        shares_reruns: Whether stages that take longest retain more, as far as there is room; else all stages
            retain as many.
        shares_chunks: As in `pack_runs`: not in models with state between tokens.

    Raises:
        ValueError: nothing fits, or there are more stages than layers.
    """
    if not batches:
        raise ValueError("batches is empty: pass the lengths of at least one optimizer step")
    cuts = tried_cuts(batches, layers, num_stages=num_stages, head_per_token=head_per_token)
    best: PipelinePlan | None = None
    for chunk_size in chunk_sizes:
        packed = [pack_runs(batch, chunk_size, shares_chunks=shares_chunks) for batch in batches]
        for cut in cuts:
            stages = [_sum([layers[index] for index in stage]) for stage in cut]
            for ahead in forwards_ahead:
                search = _Search(packed, cut, stages, head_per_token, chunk_size, ahead, max_graph_tokens)
                for retained in retained_chunks:
                    plan = search.best_from(retained, shares_reruns=shares_reruns)
                    if plan is not None and (best is None or plan.duration < best.duration):
                        best = plan
    if best is None:
        raise ValueError(
            f"max_graph_tokens={max_graph_tokens}: no setting keeps so few graphs; write more, smaller "
            "chunk_sizes, or 0 among retained_chunks"
        )
    return best


def simulate_plan(
    plan: PipelinePlan,
    lengths: Sequence[int],
    layers: Sequence[SequenceCost],
    *,
    head_per_token: float,
    shares_chunks: bool = True,
) -> Timeline:
    """One optimizer step on sequences of these lengths; arguments as in `choose_pipeline`."""
    runs = pack_runs(lengths, plan.chunk_size, shares_chunks=shares_chunks)
    stages = [_sum([layers[index] for index in stage]) for stage in plan.stages]
    search = _Search([runs], plan.stages, stages, head_per_token, plan.chunk_size, plan.forwards_ahead, None)
    return simulate(*search.parts(runs, plan.retained_chunks))


@dataclass(frozen=True)
class _Search:
    """Over the retained chunks of each stage, all else given."""

    packed: Sequence[Sequence[Run]]
    cut: tuple[range, ...]
    stages: Sequence[SequenceCost]
    head: float
    chunk_size: int
    ahead: int
    max_graph_tokens: int | None

    def best_from(self, retained: int, *, shares_reruns: bool) -> PipelinePlan | None:
        best = None
        for by_stage in self._settings((retained,) * len(self.cut), shares_reruns=shares_reruns):
            plan = self._simulated(by_stage)
            if best is None or plan.duration < best.duration:
                best = plan
        return best

    def _settings(self, retained: tuple[int, ...], *, shares_reruns: bool) -> Iterator[tuple[int, ...]]:
        """The stage that is busy longest retains twice as many, as long as that helps it and fits."""
        if not self._fits(retained):
            return
        yield retained
        if not shares_reruns:
            return
        busy = self._busy(retained)
        while True:
            slowest = max(range(len(busy)), key=busy.__getitem__)
            more = tuple(
                max(1, 2 * count) if stage == slowest else count for stage, count in enumerate(retained)
            )
            then = self._busy(more)
            if then[slowest] >= busy[slowest] or not self._fits(more):
                break
            retained, busy = more, then
        yield retained

    def _fits(self, retained: tuple[int, ...]) -> bool:
        if self.max_graph_tokens is None:
            return True
        peaks = [self._schedule(runs, retained).peak_graphs() for runs in self.packed]
        return all(
            graphs * self.chunk_size * len(layers) <= self.max_graph_tokens
            for peak in peaks
            for graphs, layers in zip(peak, self.cut, strict=True)
        )

    def _busy(self, retained: tuple[int, ...]) -> list[float]:
        """By stage, how long it does not wait."""
        busy = [0.0] * len(self.cut)
        for runs in self.packed:
            schedule, costs = self.parts(runs, retained)
            for stage in range(len(self.cut)):
                forward, backward = costs.forward[stage], costs.backward[stage]
                rerun = sum(x for i, x in enumerate(forward) if not schedule.is_retained(stage, i))
                busy[stage] += sum(forward) + sum(backward) + rerun
        return busy

    def _simulated(self, retained: tuple[int, ...]) -> PipelinePlan:
        found: list[Timeline] = [simulate(*self.parts(runs, retained)) for runs in self.packed]
        total = sum(timeline.duration for timeline in found)
        peaks = [timeline.schedule.peak_graphs() for timeline in found]
        return PipelinePlan(
            chunk_size=self.chunk_size,
            stages=self.cut,
            retained_chunks=retained,
            forwards_ahead=self.ahead,
            duration=total,
            bubble_share=sum(timeline.bubble_share * timeline.duration for timeline in found) / total,
            rerun_share=sum(timeline.rerun_share * timeline.duration for timeline in found) / total,
            peak_graphs=tuple(map(max, zip(*peaks, strict=True))),
        )

    def _schedule(self, runs: Sequence[Run], retained: tuple[int, ...]) -> PipelineSchedule:
        return schedule_1f1b(
            [run.num_chunks for run in runs],
            num_stages=len(self.cut),
            retained_chunks=retained,
            forwards_ahead=self.ahead,
        )

    def parts(self, runs: Sequence[Run], retained: tuple[int, ...]) -> tuple[PipelineSchedule, CellCosts]:
        schedule = self._schedule(runs, retained)
        return schedule, CellCosts.of_runs(schedule, runs, self.stages, head_per_token=self.head)


def _sum(layers: Sequence[SequenceCost]) -> SequenceCost:
    pairs: dict[int | None, float] = {}
    for layer in layers:
        for window, cost in layer.per_pair:
            pairs[window] = pairs.get(window, 0.0) + cost
    return SequenceCost(per_token=sum(layer.per_token for layer in layers), per_pair=tuple(pairs.items()))
