"""State-aware 1F1B (ChunkFlow, arXiv 2503.02356, section 4.3): in which order each stage runs its cells.

A cell is one chunk on one stage. Keys and values stay on their stage, so the chunks of a dependent run go
forward ascending and back descending on each stage, and nothing else ties them: gradients of hidden states
travel as in any pipeline. A cell whose graph was not retained is run again inside its backward, from its
input: no chunk is sent through the pipeline a second time.

Pure functions of numbers; standard library only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple


class MicroBatch(NamedTuple):
    """One chunk: `chunk` counts within its run, `num_after` of which come after it; `run` is an index of the
    caller's."""

    run: int
    chunk: int
    num_after: int


class Action(NamedTuple):
    """Forward or backward of a micro-batch on some stage."""

    kind: Literal["F", "B"]
    micro_batch: int


@dataclass(frozen=True, kw_only=True)
class PipelineSchedule:
    """What every stage does.

    Args:
        micro_batches: In the order of their forwards, which is the same on all stages.
        stages: By stage, its actions in their order.
        retained_chunks: By stage, how many chunks at the end of each run keep their graphs.
    """

    micro_batches: tuple[MicroBatch, ...]
    stages: tuple[tuple[Action, ...], ...]
    retained_chunks: tuple[int, ...]

    @property
    def num_stages(self) -> int:
        return len(self.stages)

    def is_retained(self, stage: int, micro_batch: int) -> bool:
        """Whether a stage keeps the graph of a micro-batch from its forward to its backward."""
        return self.micro_batches[micro_batch].num_after < self.retained_chunks[stage]

    def rows(self) -> list[list[str]]:
        """By stage, the actions as torch's pipeline runtime writes them: `2F0` is stage 2, micro-batch 0."""
        return [
            [f"{stage}{kind}{micro_batch}" for kind, micro_batch in actions]
            for stage, actions in enumerate(self.stages)
        ]

    def peak_graphs(self) -> tuple[int, ...]:
        """By stage, how many cells have a graph at a time at most, the one that is run again included."""
        return tuple(self._peak(stage, graphs_only=True) for stage in range(self.num_stages))

    def peak_inputs(self) -> tuple[int, ...]:
        """By stage, how many cells wait for their backward at a time at most: their inputs are kept."""
        return tuple(self._peak(stage, graphs_only=False) for stage in range(self.num_stages))

    def _peak(self, stage: int, *, graphs_only: bool) -> int:
        alive = peak = 0
        for kind, index in self.stages[stage]:
            counts = self.is_retained(stage, index) or not graphs_only
            alive += counts and kind == "F"
            peak = max(peak, alive + (kind == "B" and not counts))
            alive -= counts and kind == "B"
        return peak


def schedule_1f1b(
    run_lengths: Sequence[int],
    *,
    num_stages: int,
    retained_chunks: int | Sequence[int] = 1,
    forwards_ahead: int = 1,
) -> PipelineSchedule:
    """State-aware 1F1B. The longest run goes first, and while one goes back, the next goes forward.

    The last stage begins a run's backwards as soon as its last chunk is there, and never runs more than one
    forward between two backwards. Every other stage is `forwards_ahead` forwards ahead of the stage after it.
    So a stage with d stages after it has at most max(1, retained_chunks) + d * forwards_ahead graphs at a
    time, however long the runs are (one, if nothing is retained), and keeps the inputs of one run and of what
    it is ahead.

    Args:
        run_lengths: Chunks of each dependent run.
        retained_chunks: The last so many of each run keep their graphs (ChunkFlow's K); of all stages, or by
            stage: one with more layers than others makes up for it by fewer reruns.
        forwards_ahead: 1 is 1F1B's. 2 keeps stages busy where cells are unequal: some run again, some
            have longer prefixes.

    Raises:
        ValueError: no run, a run without chunks, or a number that is too small.
    """
    if not run_lengths or min(run_lengths) < 1:
        raise ValueError(
            f"run_lengths={list(run_lengths)[:8]}: pass at least one run, and no run without chunks"
        )
    of_stages = (
        (retained_chunks,) * num_stages if isinstance(retained_chunks, int) else tuple(retained_chunks)
    )
    if num_stages > 0 and len(of_stages) != num_stages:
        raise ValueError(
            f"retained_chunks={of_stages} for {num_stages} stages: pass one number, or one of each stage"
        )
    for name, value, least in (
        ("num_stages", num_stages, 1),
        ("retained_chunks", min(of_stages, default=0), 0),
        ("forwards_ahead", forwards_ahead, 1),
    ):
        if value < least:
            raise ValueError(f"{name}={value}: write at least {least}")
    micro_batches: list[MicroBatch] = []
    backwards: list[int] = []
    needed: list[int] = []  # by backward, how many forwards come before it on the last stage
    for run in sorted(range(len(run_lengths)), key=lambda run: (-run_lengths[run], run)):
        length, start = run_lengths[run], len(micro_batches)
        micro_batches += [MicroBatch(run, c, length - 1 - c) for c in range(length)]
        backwards += range(start + length - 1, start - 1, -1)
        needed += [start + length] * length
    for position in range(len(needed) - 2, -1, -1):
        needed[position] = max(needed[position], needed[position + 1] - 1)
    stages = []
    for stage in range(num_stages):
        ahead = forwards_ahead * (num_stages - 1 - stage)
        actions: list[Action] = []
        done = 0
        for num_forwards, backward in zip(needed, backwards, strict=True):
            target = min(num_forwards + ahead, len(micro_batches))
            actions += [Action("F", index) for index in range(done, target)]
            actions.append(Action("B", backward))
            done = max(done, target)
        stages.append(tuple(actions))
    return PipelineSchedule(
        micro_batches=tuple(micro_batches), stages=tuple(stages), retained_chunks=of_stages
    )
