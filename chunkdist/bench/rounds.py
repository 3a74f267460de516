"""The steps of several ways on the same tokens, in rounds, in an order that rotates.

In the first round each way warms up before its step is timed. The warm-up begins with an empty cache: the
peak of memory is its. Its gradients are compared with those of the first way that ran: a fast wrong step is
no step. A way that finds too little memory, or fails otherwise, is left out from there on, with the reason.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from chunkdist.bench.timing import Cost, Peak, cost_of, peak_of
from chunkdist.bench.ways import Way, prepared
from chunkdist.modeling import chunk_report

OUT_OF_MEMORY = "out of memory"
MOST_TOLD = 300
"""Characters of an error."""


@dataclass(frozen=True, kw_only=True)
class Step(Cost):
    """One step of one way."""

    num_tokens: int
    round: int
    way: str


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """What came of one way's turn.

    Args:
        cost: Of the timed step, if there was one.
        why_not: It failed: `OUT_OF_MEMORY`, or the error.
    """

    cost: Cost | None = None
    why_not: str | None = None


def attempt(
    model: Any,
    ids: Tensor,
    way: Way,
    *,
    warms_up: bool = True,
    is_timed: bool = True,
    after_warm_up: Callable[[Peak], None] = lambda peak: None,
) -> Attempt:
    """A step to warm up, and one that is timed. The gradients of the last one stay, if none failed."""
    cost = why_not = None
    model.zero_grad(set_to_none=True)
    try:
        with prepared(model, way, on_gpu=ids.is_cuda) as step:

            def from_no_gradients() -> None:
                model.zero_grad(set_to_none=True)
                step(ids)

            if warms_up:
                peak = peak_of(from_no_gradients, on_gpu=ids.is_cuda)
                after_warm_up(peak)
            if is_timed:
                cost = cost_of(from_no_gradients, on_gpu=ids.is_cuda)
    except torch.OutOfMemoryError:
        why_not = OUT_OF_MEMORY
    except (RuntimeError, ValueError, ImportError) as error:  # a kernel, a package, the host's memory
        why_not = f"failed: {type(error).__name__}: {' '.join(str(error).split())}"[:MOST_TOLD]
    if why_not is None:
        return Attempt(cost=cost)
    # Out here, where the traceback no longer holds tensors, memory is given back.
    model.zero_grad(set_to_none=True)
    gc.collect()
    torch.cuda.empty_cache()
    return Attempt(why_not=why_not)


class Rounds:
    """At one length. `changed` is called after each warm-up and each step.

    Attributes:
        left: Ways that have not failed.
        lost: Why the others have, by name.
        steps: Those of `left`, by time.
        peaks, differences: Of each way's warm-up, by name: memory, and the largest difference of a gradient
            from that of `compared_with`.
        plans: What was chosen in the place of `"auto"`, and why, by the name of the way.
    """

    def __init__(
        self,
        model: Any,
        ids: Tensor,
        ways: Sequence[Way],
        *,
        report: Callable[[str], None],
        changed: Callable[[Rounds], None],
    ) -> None:
        self.left, self.lost = list(ways), dict[str, str]()
        self.steps: list[Step] = []
        self.peaks: dict[str, Peak] = {}
        self.differences: dict[str, float] = {}
        self.compared_with: str | None = None
        self.plans: dict[str, str] = {}
        self._model, self._ids = model, ids
        self._report, self._changed = report, changed
        self._expected: dict[str, Tensor] = {}

    def run(self, num_rounds: int) -> None:
        """A way that has had room may have none later, when memory is in other pieces."""
        self._changed(self)
        for number in range(1, num_rounds + 1):
            self._report(f"round {number} of {num_rounds}")
            shift = (number - 1) % max(1, len(self.left))
            for way in self.left[shift:] + self.left[:shift]:
                self._report(way.name)
                self._turn(way, number)
                self._changed(self)

    def _turn(self, way: Way, number: int) -> None:
        is_first = number == 1
        found = attempt(
            self._model,
            self._ids,
            way,
            warms_up=is_first or way.begins_slowly,
            after_warm_up=lambda peak: self._warmed_up(way, peak) if is_first else None,
        )
        if found.why_not is not None:
            self._report(f"{way.name}: {found.why_not}")
            self.lost[way.name] = found.why_not
            self.left = [other for other in self.left if other is not way]
            self.steps = [step for step in self.steps if step.way != way.name]
            self.peaks.pop(way.name, None)
            return
        assert found.cost is not None
        num_tokens = self._ids.shape[1]
        self.steps.append(Step(**asdict(found.cost), num_tokens=num_tokens, round=number, way=way.name))

    def _warmed_up(self, way: Way, peak: Peak) -> None:
        name = way.name
        if way.config is not None and way.config.has_auto:
            self.plans[name] = chunk_report(self._model).reason
        grads = {key: p.grad for key, p in self._model.named_parameters() if p.grad is not None}
        if not self._expected:
            self._expected = {key: grad.clone() for key, grad in grads.items()}
            self.compared_with = name
        self.differences[name] = largest_difference(grads, self._expected)
        self.peaks[name] = peak
        self._changed(self)


def largest_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Over all parameters, the norm of the difference, relative to the norm."""
    assert found.keys() == expected.keys()
    return max(
        float((found[name] - expected[name]).float().norm() / expected[name].float().norm())
        for name in expected
    )
