"""The steps of several ways on the same tokens, in rounds, in an order that rotates.

In the first round each way warms up before its step is timed. The warm-up begins with an empty cache: the
peak of memory is its. Its gradients are compared with those of the first way that ran: a fast wrong step is
no step. A way that finds too little memory, has wrong gradients, or fails otherwise, is left out from there
on, with the reason.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from chunkdist.bench.largest import largest
from chunkdist.bench.timing import Cost, Peak, cost_of, peak_of
from chunkdist.bench.ways import Way, prepared
from chunkdist.chunking import chunk_report

OUT_OF_MEMORY = "out of memory"
DEVICE_LOST = "not run: the device was lost"
MOST_TOLD = 300
"""Characters of an error."""


class WrongGradients(Exception):
    """Those of a step, beside the first way's."""


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
        why_not: It failed: `OUT_OF_MEMORY`, wrong gradients, or the error.
        device_lost: Nothing will run on the device any more, as after an illegal access.
    """

    cost: Cost | None = None
    why_not: str | None = None
    device_lost: bool = False


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
    except WrongGradients as error:
        why_not = f"wrong gradients: {error}"[:MOST_TOLD]
    except (RuntimeError, ValueError, ImportError) as error:  # a kernel, a package, the host's memory
        why_not = f"failed: {type(error).__name__}: {' '.join(str(error).split())}"[:MOST_TOLD]
    if why_not is None:
        return Attempt(cost=cost)
    # Out here, where the traceback no longer holds tensors, memory is given back.
    model.zero_grad(set_to_none=True)
    gc.collect()
    try:
        torch.cuda.empty_cache()
    except RuntimeError:
        return Attempt(why_not=f"{why_not}; the device is lost", device_lost=True)
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
                if not self.left:
                    return
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
            if found.device_lost:
                self.lost |= {other.name: DEVICE_LOST for other in self.left if other.name not in self.peaks}
                self.left = []
            return
        assert found.cost is not None
        num_tokens = self._ids.shape[1]
        self.steps.append(Step(**asdict(found.cost), num_tokens=num_tokens, round=number, way=way.name))

    def _warmed_up(self, way: Way, peak: Peak) -> None:
        name = way.name
        if way.config is not None and way.config.has_auto:
            self.plans[name] = chunk_report(self._model).reason
        grads = {key: p.grad for key, p in self._model.named_parameters() if p.grad is not None}
        difference = largest_difference(grads, self._expected or grads)
        allowed = allowed_difference(self._model)
        if not difference <= allowed:
            base = self.compared_with or name
            raise WrongGradients(
                f"they differ from those of {base} by {difference:.1e}, more than {allowed:g}"
            )
        if not self._expected:  # on the host: on the device they would be in the peaks of those that follow
            self._expected = {key: grad.to("cpu", copy=True) for key, grad in grads.items()}
            self.compared_with = name
        self.differences[name] = difference
        self.peaks[name] = peak
        self._changed(self)


def largest_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Over all parameters, the norm of the difference, relative to the norm; NaN where there is any.

    Raises:
        WrongGradients: they are not of the same parameters.
    """
    if found.keys() != expected.keys():
        alone = sorted(found.keys() ^ expected.keys())
        raise WrongGradients(f"{len(alone)} parameters have one here or there only, {alone[0]} among them")
    return largest(_difference(found[name], expected[name].to(found[name].device)) for name in expected)


def _difference(found: Tensor, expected: Tensor) -> float:
    difference = (found - expected).float().norm()
    return float(difference if difference == 0 else difference / expected.float().norm())


def allowed_difference(model: Any) -> float:
    """Of the gradients of two ways that are both right: in half precision, each is off by some percent."""
    wide = torch.float32, torch.float64
    return 1e-3 if all(p.dtype in wide for p in model.parameters()) else 0.3
