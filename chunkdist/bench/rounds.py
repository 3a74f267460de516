"""The steps of several variants on the same tokens, in rounds, in an order that rotates.

In the first round each variant warms up before its step is timed. The warm-up begins with an empty cache, so
the peak of memory is its own. Its gradients are compared with those of the first variant that ran: a fast
wrong step is no step. A variant that finds too little memory, has wrong gradients, or fails otherwise, is
left out from there on, with the reason.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from chunkdist.bench.timing import Cost, cost_of, largest, peak_of, report_progress, rotated
from chunkdist.bench.variants import Variant, prepared
from chunkdist.chunking import chunk_report
from chunkdist.recovery import is_out_of_memory

OUT_OF_MEMORY = "out of memory"
_ERROR_CHARACTERS = 300


class WrongGradients(Exception):
    """The gradients of a step differ from the first variant's by more than rounding."""


def attempt(
    model: Any,
    ids: Tensor,
    variant: Variant,
    *,
    warms_up: bool = True,
    is_timed: bool = True,
    after_warm_up: Callable[[dict[str, int]], None] = lambda peak: None,
) -> tuple[Cost | None, str | None]:
    """A step to warm up, and one that is timed: what that cost, and why the turn failed (`OUT_OF_MEMORY`,
    wrong gradients, or the error). The gradients of the last step stay, if none failed."""
    cost = why_not = None
    model.zero_grad(set_to_none=True)
    try:
        with prepared(model, variant, on_gpu=ids.is_cuda) as step:

            def from_no_gradients() -> None:
                model.zero_grad(set_to_none=True)
                step(ids)

            if warms_up:
                after_warm_up(peak_of(from_no_gradients))
            if is_timed:
                cost = cost_of(from_no_gradients)
    except WrongGradients as error:
        why_not = f"wrong gradients: {error}"[:_ERROR_CHARACTERS]
    except (RuntimeError, ValueError, ImportError) as error:  # a kernel, a package, the host's memory
        why_not = f"failed: {type(error).__name__}: {' '.join(str(error).split())}"[:_ERROR_CHARACTERS]
        if is_out_of_memory(error):
            why_not = OUT_OF_MEMORY
    if why_not is None:
        return cost, None
    # Out here, where the traceback no longer holds tensors, memory is given back.
    model.zero_grad(set_to_none=True)
    gc.collect()
    with suppress(RuntimeError):  # after an illegal access everything fails, and says so in its row
        torch.cuda.empty_cache()
    return None, why_not


class Rounds:
    """All variants at one length.

    Attributes:
        left: The variants that have not failed.
        lost: Why the others have, by name.
        costs: The timed steps of `left`, by name, in the order of the rounds.
        warm_ups: By name: peaks of memory, the largest difference of a gradient from that of
            `compared_with`, and what was chosen in the place of `"auto"`.
    """

    def __init__(
        self, model: Any, ids: Tensor, variants: Sequence[Variant], changed: Callable[[Rounds], None]
    ) -> None:
        self.left, self.lost = list(variants), dict[str, str]()
        self.costs: dict[str, list[Cost]] = {}
        self.warm_ups: dict[str, dict[str, Any]] = {}
        self.num_tokens = ids.shape[1]
        self._model, self._ids, self._changed = model, ids, changed
        self._compared_with: str | None = None
        self._expected: dict[str, Tensor] = {}

    def run(self, num_rounds: int) -> None:
        """Runs all rounds; `changed` is called after each step."""
        self._changed(self)
        for number in range(num_rounds):
            for variant in rotated(self.left, number):
                report_progress(f"round {number + 1} of {num_rounds}: {variant.name}")
                self._turn(variant, is_first=number == 0)
                self._changed(self)

    def _turn(self, variant: Variant, *, is_first: bool) -> None:
        """A variant that has had room may have none later, when memory is in other pieces."""
        cost, why_not = attempt(
            self._model,
            self._ids,
            variant,
            warms_up=is_first or variant.begins_slowly,
            after_warm_up=lambda peak: self._warmed_up(variant, peak) if is_first else None,
        )
        if cost is not None:
            self.costs.setdefault(variant.name, []).append(cost)
            return
        report_progress(f"{variant.name}: {why_not}")
        self.lost[variant.name] = str(why_not)
        self.left = [other for other in self.left if other is not variant]
        self.costs.pop(variant.name, None)
        self.warm_ups.pop(variant.name, None)

    def _warmed_up(self, variant: Variant, peak: dict[str, int]) -> None:
        name = variant.name
        grads = {key: p.grad for key, p in self._model.named_parameters() if p.grad is not None}
        difference = largest_difference(grads, self._expected or grads)
        allowed = allowed_difference(self._model)
        if not difference <= allowed:
            base = self._compared_with or name
            raise WrongGradients(
                f"they differ from those of {base} by {difference:.1e}, more than {allowed:g}"
            )
        if not self._expected:  # on the host: on the device they would be in the peaks of those that follow
            self._expected = {key: grad.to("cpu", copy=True) for key, grad in grads.items()}
            self._compared_with = name
        self.warm_ups[name] = {
            **peak,
            "largest_gradient_difference": difference,
            "compared_with": self._compared_with,
        }
        if variant.config is not None and variant.config.has_auto:
            self.warm_ups[name]["plan"] = chunk_report(self._model).reason


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
    """How far the gradients of two right variants may differ: in half precision, each is off by some
    percent."""
    wide = torch.float32, torch.float64
    return 1e-3 if all(p.dtype in wide for p in model.parameters()) else 0.3
