"""Asks a forward hook inside of a layer whether it treats each token alone.

A hook there is called once a chunk, with a chunk's tokens. What it is called with in the first pass is noted
for some chunks; then it is called with all of them at once, and with each alone: results and gradients must
be the same. Nothing but the hook is compared, so that a change of a thousandth is seen beside large hidden
states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from chunkdist.errors import UnsupportedModelError
from chunkdist.models.known_code import name_of

_NOTED_BYTES = 2**26
"""Chunks are noted up to this size, a hook at a time; at least `_MIN_CHUNKS`."""
_MIN_CHUNKS = 2
_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-5}
_HALF_TOLERANCE = 2e-3
"""Bound, relative to a token's norm. Rounding of bf16 itself does not count: both ways round the same sums,
but for a few."""


@dataclass(frozen=True, eq=False)
class Hook:
    """A forward hook or forward pre-hook on a module inside of a layer."""

    module: nn.Module
    path: str
    slots: dict[int, Callable[..., Any]]
    key: int
    is_pre: bool
    function: Callable[..., Any] = field(repr=False)

    def describe(self) -> str:
        kind = "forward pre-hook" if self.is_pre else "forward hook"
        return f"the {kind} {name_of(self.function)} on {self.path}"


class HookNotes:
    """Stands in a hook's place for a pass, calls it, and notes what it is called with."""

    def __init__(self, hook: Hook, num_tokens: Callable[[], int]) -> None:
        self.hook = hook
        self.only_looks = True
        """Whether it changed nothing, and returned nothing else than it got."""
        self._num_tokens = num_tokens
        self._calls: list[tuple[int, list[Any]]] = []
        self._num_bytes = 0
        self._is_over = False

    def __call__(self, module: nn.Module, *inputs: Any) -> Any:
        tensors = _tensors_of(inputs)
        copies = None
        if not self._is_over and (self._num_bytes < _NOTED_BYTES or len(self._calls) < _MIN_CHUNKS):
            copies = [_map(x, _copy) for x in inputs]
            self._num_bytes += sum(x.numel() * x.element_size() for x in tensors)
        versions = [_version_of(x) for x in tensors]
        result = self.hook.function(module, *inputs)
        same = result is None or any(result is x for x in (inputs[-1], inputs[0]))
        if not same or versions != [_version_of(x) for x in tensors]:
            self.only_looks = False
        if copies is not None:
            self._calls.append((self._num_tokens(), copies))
        return result

    @contextmanager
    def in_place(self) -> Iterator[None]:
        self.hook.slots[self.hook.key] = self
        try:
            yield
        finally:
            self._is_over = True
            if self.hook.key in self.hook.slots:
                self.hook.slots[self.hook.key] = self.hook.function

    def forget(self) -> None:
        """Lets go of what was noted: the rerun in the backward meets this object again, and holds it."""
        self._calls = []

    def check(self, own_parameters: set[int]) -> bool:
        """Compares all calls at once with one after another; whether that showed anything.

        Raises:
            UnsupportedModelError: the hook looks at other tokens, or trains what is not in its layer.
        """
        parts, self._calls = [(n, inputs) for n, inputs in self._calls if n > 0], []
        if sum(n for n, _ in parts) < 2:
            return False
        dims = [_token_dims(parts, place) for place in range(len(_tensors_of(parts[0][1])))]
        if any(len(_tensors_of(inputs)) != len(dims) for _, inputs in parts) or all(d is None for d in dims):
            raise UnsupportedModelError(
                f"{self.hook.describe()}: what it gets has no dim of tokens, so it cannot be asked whether "
                "it treats each token alone; put it on a whole layer, whose hooks get the whole sequence"
            )
        whole = _joined([inputs for _, inputs in parts], dims)
        pieces = [inputs for _, inputs in parts] if len(parts) > 1 else _cut(whole, dims)
        expected, grads = self._run(whole, own_parameters)
        runs = [self._run(piece, own_parameters) for piece in pieces]
        found = _joined([result for result, _ in runs], _result_dims(expected, [r for r, _ in runs]))
        error = _largest_error(_tensors_of(expected), _tensors_of(found))
        if grads is not None:
            parts_grads: Any = [piece_grads for _, piece_grads in runs]
            if all(piece is not None for piece in parts_grads):
                joined = _joined(
                    parts_grads, [d for d, x in zip(dims, _tensors_of(whole), strict=True) if _floats(x)]
                )
                error = max(error, _largest_error(grads, joined))
        if not error <= 1:
            raise UnsupportedModelError(
                f"{self.hook.describe()} looks at other tokens than each one alone, or draws random "
                "numbers: inside of a layer it is called with one chunk at a time, and makes something else "
                "of it than of the whole sequence; put it on a whole layer, whose hooks get all tokens"
            )
        before, after = _tensors_of(whole[0] if self.hook.is_pre else whole[-1]), _tensors_of(expected)
        return len(before) != len(after) or any(
            a.shape != b.shape or not torch.equal(a, b) for a, b in zip(before, after, strict=True)
        )

    def _run(self, inputs: list[Any], own_parameters: set[int]) -> tuple[Any, list[Tensor] | None]:
        """What the hook makes of `inputs`, and gradients of their floating-point tensors."""
        leaves: list[Tensor] = []

        def leaf(x: Tensor) -> Tensor:
            if not _floats(x) or not torch.is_grad_enabled():
                return x.clone()
            leaves.append(x.detach().clone().requires_grad_())
            return leaves[-1].clone()  # hooks may write into it

        given = [_map(x, leaf) for x in inputs]
        try:
            result = self.hook.function(self.hook.module, *given)
        except Exception as error:
            raise UnsupportedModelError(
                f"{self.hook.describe()} fails with other numbers of tokens than the one that it got: {error}"
            ) from error
        result = given[0 if self.hook.is_pre else -1] if result is None else result
        outputs = [x for x in _tensors_of(result) if x.requires_grad]
        if foreign := _trained(outputs) - {id(x) for x in leaves} - own_parameters:
            raise UnsupportedModelError(
                f"{self.hook.describe()} trains {len(foreign)} tensors that are no parameters of its layer, "
                "which a chunked step does not see: make them parameters of a module inside of the layer"
            )
        if not outputs or not leaves:
            return _map(result, lambda x: x.detach()), None
        grads = torch.autograd.grad(outputs, leaves, [_grad(x) for x in outputs], allow_unused=True)
        grads_or_zeros = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)]
        return _map(result, lambda x: x.detach()), grads_or_zeros


def _grad(x: Tensor) -> Tensor:
    """Gradient of an output; a function of the values, so that it is the same for a token in any piece."""
    return torch.cos(3 * x.detach())


def _largest_error(expected: list[Tensor], found: list[Tensor]) -> float:
    """In units of the tolerance, of the worst token."""
    worst = 0.0 if len(expected) == len(found) else float("inf")
    for a, b in zip(expected, found, strict=False):
        if a.shape != b.shape:
            return float("inf")
        if torch.equal(a, b) or a.ndim == 0:
            continue
        is_narrow = a.device.type != "cpu" and a.dtype == torch.float32  # TF32
        tolerance = _HALF_TOLERANCE if is_narrow else _TOLERANCES.get(a.dtype, _HALF_TOLERANCE)
        difference, norm = (x.double().norm(dim=-1) for x in (a - b, a))
        ratio = (difference / (tolerance * (norm + 1e-3 * norm.max()) + 1e-300)).max().item()
        worst = max(worst, ratio if ratio == ratio else float("inf"))
    return worst


def _token_dims(parts: list[tuple[int, list[Any]]], place: int) -> int | None:
    """The dim of one of the tensors that runs along the tokens; `None`: there is none."""
    tensors = [_tensors_of(inputs)[place] for _, inputs in parts if place < len(_tensors_of(inputs))]
    if len({x.ndim for x in tensors}) != 1:
        return None
    dims = range(tensors[0].ndim)
    along = [d for d in dims if all(x.shape[d] == n for x, (n, _) in zip(tensors, parts, strict=False))]
    if along:
        return next((d for d in along if d > 0), along[0])
    rest = {(*x.shape[1:],) for x in tensors}
    is_flat = len(rest) == 1 and tensors[0].ndim >= 2 and all(x.shape[0] > 1 for x in tensors)
    return 0 if is_flat and (tensors[0].ndim == 2 or len({x.shape[0] for x in tensors}) > 1) else None


def _result_dims(whole: Any, pieces: list[Any]) -> list[int | None]:
    """Along which dims the results of pieces add up to that of the whole."""
    dims: list[int | None] = []
    for place, x in enumerate(_tensors_of(whole)):
        parts = [_tensors_of(piece)[place] for piece in pieces if place < len(_tensors_of(piece))]
        fits = [
            d
            for d in range(x.ndim)
            if all(p.ndim == x.ndim for p in parts) and sum(p.shape[d] for p in parts) == x.shape[d]
        ]
        dims.append(fits[0] if fits else None)
    return dims


def _joined(parts: list[Any], dims: list[int | None]) -> Any:
    """The tensors of `parts` one after another; what has no dim of tokens is the first's."""
    columns = list(zip(*(_tensors_of(part) for part in parts), strict=False))
    joined = [c[0] if d is None else torch.cat(c, dim=d) for c, d in zip(columns, dims, strict=False)]
    return _with_tensors(parts[0], joined)


def _cut(whole: Any, dims: list[int | None]) -> list[Any]:
    """In two or three."""
    tensors = _tensors_of(whole)
    num = min([3, *(x.shape[d] for x, d in zip(tensors, dims, strict=True) if d is not None)])
    pieces = []
    for index in range(num):
        cuts = [
            x if d is None else x.tensor_split(num, dim=d)[index] for x, d in zip(tensors, dims, strict=True)
        ]
        pieces.append(_with_tensors(whole, cuts))
    return pieces


def _trained(outputs: list[Tensor]) -> set[int]:
    """Ids of the leaves that a graph ends in."""
    nodes, leaves = [x.grad_fn for x in outputs], set()
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        if node is None:
            continue
        if (leaf := getattr(node, "variable", None)) is not None:
            leaves.add(id(leaf))
        new = {next_node for next_node, _ in node.next_functions} - seen
        seen |= new
        nodes += new
    return leaves


def _floats(x: Tensor) -> bool:
    return x.is_floating_point()


def _copy(x: Tensor) -> Tensor:
    return x.detach().clone()


def _version_of(x: Tensor) -> Any:
    return x.detach().clone().sum().item() if x.is_inference() else x._version


def _tensors_of(x: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _map(x, lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
    return found


def _with_tensors(like: Any, tensors: list[Tensor]) -> Any:
    """`like`, with other tensors in the places of its own."""
    rest = iter(tensors)
    return _map(like, lambda x: next(rest, x))


def _map(x: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(x, Tensor):
        return function(x)
    if isinstance(x, Mapping):
        return {key: _map(item, function) for key, item in x.items()}
    if isinstance(x, (tuple, list)):
        items = [_map(item, function) for item in x]
        return type(x)(*items) if hasattr(x, "_fields") else type(x)(items)
    return x
