"""The gradient check: one step on a short sample, chunked against unchunked, on the user's own model and
data.

Two questions, since rounding hides small faults in a narrow dtype:

1. Is it the same function? In a wider dtype (bf16 and fp16: fp32; fp32: fp64) the chunked step must equal the
   plain one, in every parameter, to 1e-4 (fp64: 1e-6).
2. Is it as good as the plain step in the dtype that is trained in? Both are compared with the plain step in
   the wider dtype. The plain step's rounding error is drawn three times, by moving its input by one unit of
   rounding, and the worst counts: where a router is near a tie, luck sends a token to another expert. The
   chunked step may be half as far again over all gradients, and twice as far in its worst parameter.

Where no wider copy can be made (quantised weights, not enough memory), both are compared with the plain step
itself, and the first question is left out.

A difference is a norm over one parameter, relative to the norm of that parameter's gradient. Gradients that
vanish (a bias of the keys, an expert that got no token) have no relative error: a parameter whose gradient is
less than a thousandth of the model's root mean square counts as if it were that large.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from chunkdist.check.model_state import in_dtype, nudged, refuse_absent_weights, untouched, why_not_widened
from chunkdist.check.sample import CHECK_TOKENS, check_chunk_size, short_sample
from chunkdist.chunking import chunk_model, chunk_report, unchunk_model
from chunkdist.config import ChunkConfig

_WIDER = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float32: torch.float64}
_ROUNDING = {torch.bfloat16: 4e-3, torch.float16: 1e-3, torch.float32: 1e-5, torch.float64: 1e-6}
"""Differences that are no fault in a dtype, however small the plain step's own."""
_EXACT = {torch.float32: 1e-4, torch.float64: 1e-6}
_NEGLIGIBLE = 1e-3
_DRAWS = 3  # of the plain step's rounding error
_SLICE = 2**24  # elements that are compared at once

Gradients = dict[str, Tensor | None]


@dataclass(frozen=True, kw_only=True)
class Distance:
    """Between the gradients of two steps, relative: over all parameters, and of the worst one."""

    overall: float
    largest: float
    worst: str


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """What the check found.

    Args:
        chunked: From the reference to the chunked step.
        plain: To the plain step, the worst of three: its own rounding error.
        exact: Between the two in the wider dtype; `None` where that was not possible.
        reference: What the reference is.
        notes: What was done otherwise than usual.
    """

    passed: bool
    num_tokens: int
    num_chunks: int
    chunk_size: int
    num_parameters: int
    chunked: Distance
    plain: Distance
    exact: Distance | None
    reference: str
    notes: tuple[str, ...]

    def report(self) -> str:
        """Lines for a person."""
        lines = [
            f"gradient check {'passed' if self.passed else 'FAILED'}: {self.num_tokens} tokens in "
            f"{self.num_chunks} chunks of {self.chunk_size}, {self.num_parameters} gradients against "
            f"{self.reference}",
            f"  chunked: {_describe(self.chunked)}",
            f"  plain:   {_describe(self.plain)}",
        ]
        if self.exact is not None:
            lines.append(f"  chunked against plain in the wider dtype: {_describe(self.exact)}")
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


def check_gradients(
    model: nn.Module, batch: Mapping[str, Any], config: ChunkConfig, *, max_tokens: int = CHECK_TOKENS
) -> CheckResult:
    """Compares gradients of the chunked and the plain model. The model is left as it was: weights, gradients,
    mode, random state, chunked or not.

    Args:
        model: As for `chunk_model`; if it is chunked, then with `config`.
        batch: What the model is called with, `input_ids` (B, T) at least. Cut to `max_tokens`; where it then
            has no labels, every token is predicted.
        config: Its chunk size is reduced so that there are three chunks and a part of one. Chunks are not
            sampled.

    Raises:
        ValueError: nothing is trained, too few tokens, or the model is chunked in another way.
        UnsupportedModelError: the model cannot be chunked.
        RuntimeError: the weights are not here (sharded, or offloaded).
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError(
            "no parameter of the model requires a gradient, there is nothing to check: unfreeze some"
        )
    refuse_absent_weights(model)
    device = next(iter(parameters.values())).device
    sample = short_sample(batch, max_tokens=max_tokens, device=device)
    num_tokens = sample["input_ids"].shape[1]
    chunk_size = check_chunk_size(num_tokens, int(config.without_auto().chunk_size))
    check_config = dataclasses.replace(config, chunk_size=chunk_size, sampler=None, control_variate="auto")
    dtype = _working_dtype(model, device)
    steps = _Steps(model, parameters, sample, check_config)
    with untouched(model), _unchunked(model, config):
        plain = steps.plain()
        reference = _in_wider_dtype(steps, dtype)
        if isinstance(reference, str):
            why = f"no step in a wider dtype: {reference}"
            reference = _Reference(grads=plain, name="the plain step, rounded like this one", notes=(why,))
        distances = [_distance(reference.grads, plain)] if reference.grads is not plain else []
        for seed in range(len(distances), _DRAWS):
            with nudged(model, dtype, seed):
                distances.append(_distance(reference.grads, steps.plain()))
        chunked = _distance(reference.grads, steps.chunked())
    rounding = _worst(distances)
    return CheckResult(
        passed=reference.is_exact and as_good_as(chunked, rounding, slack=_ROUNDING[dtype]),
        num_tokens=num_tokens,
        num_chunks=math.ceil(num_tokens / chunk_size),
        chunk_size=chunk_size,
        num_parameters=len(parameters),
        chunked=chunked,
        plain=rounding,
        exact=reference.exact,
        reference=reference.name,
        notes=reference.notes,
    )


def as_good_as(chunked: Distance, plain: Distance, slack: float) -> bool:
    """Whether the chunked step is not clearly further from the truth than the plain one. NaN is not."""
    overall_is = chunked.overall <= 1.5 * plain.overall + slack
    return overall_is and chunked.largest <= 2 * plain.largest + slack


class _Steps:
    """Forward and backward of one sample; `model` is plain before and after."""

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        sample: Mapping[str, Any],
        config: ChunkConfig,
    ) -> None:
        self.model = model
        self.config = config
        self._parameters = parameters
        self._sample = sample

    def plain(self) -> Gradients:
        try:
            loss = self.model(**self._sample, use_cache=False).loss
            with torch.autocast(loss.device.type, enabled=False):  # the forward's operations know theirs
                loss.backward()
            return {name: None if p.grad is None else p.grad.cpu() for name, p in self._parameters.items()}
        finally:
            for parameter in self._parameters.values():
                parameter.grad = None

    def chunked(self, **changes: Any) -> Gradients:
        chunk_model(self.model, dataclasses.replace(self.config, **changes))
        try:
            return self.plain()
        finally:
            unchunk_model(self.model)


@dataclass(frozen=True, kw_only=True)
class _Reference:
    """What the chunked and the plain step are compared with."""

    grads: Gradients
    name: str
    exact: Distance | None = None
    is_exact: bool = True
    notes: tuple[str, ...] = ()


def _in_wider_dtype(steps: _Steps, dtype: torch.dtype) -> _Reference | str:
    """The plain step in a wider dtype, and the chunked one beside it; or why they cannot run."""
    wider = _WIDER.get(dtype)
    if wider is None:
        return f"there is none for {_name(dtype)}"
    if why_not := why_not_widened(steps.model, wider):
        return why_not
    try:
        with in_dtype(steps.model, wider):
            truth = steps.plain()
            exact = _distance(truth, steps.chunked(attention="auto"))  # the configured one may not know it
    except (RuntimeError, NotImplementedError) as error:  # an operation without that dtype, no memory left
        return str(error).splitlines()[0]
    except KeyError:  # Liger's kernels look their dtypes up
        return f"the model's kernels do not take {_name(wider)}"
    name = f"the plain step in {_name(wider)}"
    return _Reference(grads=truth, name=name, exact=exact, is_exact=exact.largest <= _EXACT[wider])


@contextmanager
def _unchunked(model: nn.Module, config: ChunkConfig) -> Iterator[None]:
    """Plain inside; outside chunked with `config`, if it was."""
    try:
        report = chunk_report(model)
    except ValueError:
        yield
        return
    given = report.chunk_size, report.retained_chunks
    if not config.has_auto and given != (config.chunk_size, config.retained_chunks):
        raise ValueError(
            f"the model is chunked with chunk_size={report.chunk_size} and retained_chunks="
            f"{report.retained_chunks}, the check got {config.chunk_size} and {config.retained_chunks}: "
            "pass the config that the model is chunked with"
        )
    unchunk_model(model)
    try:
        yield
    finally:
        chunk_model(model, config)


def _distance(reference: Gradients, other: Gradients) -> Distance:
    """Relative differences; a gradient that only one of the two has counts as 0 in the other."""
    norms = {name: _norms(reference[name], other[name]) for name in reference}
    num_elements = sum(numel for _, _, numel in norms.values())
    total = math.sqrt(sum(norm**2 for norm, _, _ in norms.values()))
    if not num_elements or not math.isfinite(total) or total == 0:
        raise ValueError(
            f"the gradients of the sample are {total}, nothing can be compared: check data and weights"
        )
    relative = {
        name: difference / max(norm, _NEGLIGIBLE * total * math.sqrt(numel / num_elements))
        for name, (norm, difference, numel) in norms.items()
        if numel
    }
    worst = max(relative, key=lambda name: math.inf if math.isnan(relative[name]) else relative[name])
    overall = math.sqrt(sum(difference**2 for _, difference, _ in norms.values())) / total
    return Distance(overall=overall, largest=relative[worst], worst=worst)


def _worst(distances: list[Distance]) -> Distance:
    by_largest = max(distances, key=lambda distance: distance.largest)
    return dataclasses.replace(by_largest, overall=max(distance.overall for distance in distances))


def _norms(reference: Tensor | None, other: Tensor | None) -> tuple[float, float, int]:
    """Norms of the reference and of the difference, in fp64, and the number of elements."""
    some = other if reference is None else reference
    if some is None:
        return 0.0, 0.0, 0
    zero = torch.zeros((), dtype=some.dtype).expand_as(some)
    squares, difference_squares = 0.0, 0.0
    first, second = (zero if grad is None else grad for grad in (reference, other))
    for a, b in zip(*(torch.split(grad.flatten(), _SLICE) for grad in (first, second)), strict=True):
        a, b = a.double(), b.double()
        squares += float(a.square().sum())
        difference_squares += float((a - b).square().sum())
    return math.sqrt(squares), math.sqrt(difference_squares), some.numel()


def _working_dtype(model: nn.Module, device: torch.device) -> torch.dtype:
    """The narrowest dtype that the step computes in."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    dtypes = {p.dtype for p in model.parameters() if p.dtype in _ROUNDING}
    return min(dtypes, key=lambda dtype: -_ROUNDING[dtype], default=torch.float32)


def _describe(distance: Distance) -> str:
    return f"{distance.overall:.1e} over all, at most {distance.largest:.1e} ({distance.worst})"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
