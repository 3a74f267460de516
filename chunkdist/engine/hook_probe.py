"""Asks a forward hook inside of a layer whether it treats each token alone.

A hook there is called once a chunk, with a chunk's tokens. What it is called with in the first pass is noted
for some chunks; then it is called with all of them at once, with each alone, and with the first token and
the rest, and with as many as a whole row has: results, also those of the pass itself, and gradients must be
the same. Nothing but the hook is compared, so that a change of a thousandth is seen beside large hidden
states.

A hook that changes nothing is called twice more, with two chunks and with a whole row, if its code has
branches: one may be for rows only. Without, it is not called more often than the pass calls it: it may count,
or keep what it sees. It is watched in the first rerun, which is the first to have a graph.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from chunkdist.engine.token_errors import error_of_pieces, error_of_row, largest_error
from chunkdist.engine.token_pieces import (
    cut,
    first_and_rest,
    joined,
    map_tensors,
    repeated,
    tensors_of,
    token_dims,
)
from chunkdist.errors import UnsupportedModelError
from chunkdist.models.known_code import has_branches, name_of
from chunkdist.recovery import is_out_of_memory
from chunkdist.replay import undisturbed_rng

logger = logging.getLogger("chunkdist")

NOTED_BYTES = 2**26
"""Chunks are noted up to this size, a hook at a time; at least `_MIN_CHUNKS`."""
_MIN_CHUNKS = 2


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
    """Stands in a hook's place for a pass and its rerun, calls it, and notes what it is called with.

    Args:
        num_tokens: Of the chunk that runs.
        row_tokens: What the hook would be called with without chunks.
    """

    def __init__(self, hook: Hook, layer: nn.Module, num_tokens: Callable[[], int], row_tokens: int) -> None:
        self.hook = hook
        self._layer = layer
        self._row_tokens = row_tokens
        self.only_looks = True
        """Whether it changed nothing, and returned nothing else than it got."""
        self._num_tokens = num_tokens
        self._calls: list[tuple[int, list[Any]]] = []
        self._results: list[Any] = []
        """What the hook made of the same calls."""
        self._num_bytes = 0
        self._is_over = False

    def __call__(self, module: nn.Module, *inputs: Any) -> Any:
        tensors = tensors_of(inputs)
        is_noted = self._is_over or self._num_bytes < NOTED_BYTES or len(self._calls) < _MIN_CHUNKS
        copies = [map_tensors(x, _copy) for x in inputs] if is_noted else []
        versions, num_hooks = [_version_of(x) for x in tensors], _num_tensor_hooks(tensors)
        result = self._call(module, inputs)
        same = result is None or any(result is x for x in (inputs[-1], inputs[0]))
        changes = not same or versions != [_version_of(x) for x in tensors]
        has_tensor_hooks = _num_tensor_hooks(tensors) > num_hooks
        if self._is_over:
            if self.only_looks and (changes or has_tensor_hooks):
                self._ask_in_rerun(copies, changes=changes)
            return result
        if changes or has_tensor_hooks:
            self.only_looks = False
        if is_noted:
            self._calls.append((self._num_tokens(), copies))
            self._results.append(
                map_tensors(self._result(inputs, result), _copy) if changes else self._result(copies, None)
            )
            self._num_bytes += sum(x.numel() * x.element_size() for x in tensors)
        return result

    def _call(self, module: nn.Module, inputs: tuple[Any, ...]) -> Any:
        try:
            return self.hook.function(module, *inputs)
        except Exception as error:
            if type(error) not in (
                RuntimeError,
                IndexError,
                ValueError,
            ):  # memory, or a way to stop a forward
                raise
            raise UnsupportedModelError(
                f"{self.hook.describe()} fails: {error}. Inside of a layer it is called with one chunk at a "
                "time, and in the forward without a graph; put it on a whole layer, whose hooks get the "
                "whole sequence and its graph"
            ) from error

    def _result(self, inputs: Any, result: Any) -> Any:
        return inputs[0 if self.hook.is_pre else -1] if result is None else result

    def _ask_in_rerun(self, copies: list[Any], *, changes: bool) -> None:
        """In the forward, without a graph, the hook has changed nothing."""
        if changes:
            raise UnsupportedModelError(
                f"{self.hook.describe()} changes what it gets only where there is a graph (it asks for "
                "torch.is_grad_enabled or requires_grad), and inside of a layer the forward runs without "
                "one: let it do the same in both, or put it on a whole layer"
            )
        self._calls, self._results = [(self._num_tokens(), copies)], [self._result(copies, None)]
        with undisturbed_rng(tensors_of(copies)[0]):
            self._compare()

    @contextmanager
    def in_place(self) -> Iterator[None]:
        self.hook.slots[self.hook.key] = self
        try:
            yield
        finally:
            self._is_over = True
            if self.hook.key in self.hook.slots:
                self.hook.slots[self.hook.key] = self.hook.function

    def check(self) -> bool:
        """Compares all calls at once with one after another; whether that showed anything.

        Raises:
            UnsupportedModelError: the hook looks at other tokens, or trains what is not in its layer.
        """
        if not self.only_looks:
            return self._compare()
        if has_branches(self.hook.function):
            self._compare(once=True)
        self._calls, self._results = [], []  # the rerun in the backward meets this object again, and holds it
        return True

    def _compare(self, *, once: bool = False) -> bool:
        """`once`: with two chunks and with a row only, of a hook that has changed nothing."""
        calls, self._calls = list(zip(self._calls, self._results, strict=True)), []
        calls, self._results = [call for call in calls if call[0][0] > 0], []
        calls = calls[: 2 if once else None]
        parts, in_pass = [call for call, _ in calls], [result for _, result in calls]
        num_tokens = sum(n for n, _ in parts)
        if num_tokens < 2:
            return False
        dims = [token_dims(parts, place) for place in range(len(tensors_of(parts[0][1])))]
        if any(len(tensors_of(inputs)) != len(dims) for _, inputs in parts) or all(d is None for d in dims):
            if once:
                return False
            raise UnsupportedModelError(
                f"{self.hook.describe()}: what it gets has no dim of tokens, so it cannot be asked whether "
                "it treats each token alone; put it on a whole layer, whose hooks get the whole sequence"
            )
        whole = joined([inputs for _, inputs in parts], dims)
        expected, grads = self._run(whole)
        error = error_of_pieces(expected, in_pass)
        along = [d for d, x in zip(dims, tensors_of(whole), strict=True) if _floats(x)]
        for pieces in () if once else self._pieces(whole, dims, parts):
            runs = [self._run(piece) for piece in pieces]
            error = max(error, error_of_pieces(expected, [result for result, _ in runs]))
            parts_grads: Any = [piece_grads for _, piece_grads in runs]
            if grads is not None and all(piece is not None for piece in parts_grads):
                error = max(error, largest_error(grads, joined(parts_grads, along)))
        if num_tokens != self._row_tokens:
            error = max(error, self._error_of_row(whole, dims, expected, grads, num_tokens))
        if not error <= 1:
            raise UnsupportedModelError(
                f"{self.hook.describe()} looks at other tokens than each one alone, draws random numbers, or "
                "does not do the same at each call or with any number of tokens: inside of a layer it is "
                "called with one chunk at a time, and makes something else of it than of the whole sequence; "
                "put it on a whole layer, whose hooks get all tokens"
            )
        before, after = tensors_of(whole[0] if self.hook.is_pre else whole[-1]), tensors_of(expected)
        return len(before) != len(after) or any(
            a.shape != b.shape or not torch.equal(a, b) for a, b in zip(before, after, strict=True)
        )

    def _pieces(
        self, whole: Any, dims: list[int | None], parts: list[tuple[int, list[Any]]]
    ) -> Iterator[list[Any]]:
        yield [inputs for _, inputs in parts] if len(parts) > 1 else cut(whole, dims)
        yield first_and_rest(whole, dims)

    def _error_of_row(
        self,
        whole: Any,
        dims: list[int | None],
        expected: Any,
        grads: list[Tensor] | None,
        num_tokens: int,
    ) -> float:
        """With as many tokens as a row has: those of `whole` over and over."""
        factor = self._row_tokens / num_tokens
        try:
            found, row_grads = self._run(repeated(whole, dims, factor))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            logger.warning(
                "chunkdist: there is not enough memory to ask %s whether it does the same with all %d tokens",
                self.hook.describe(),
                self._row_tokens,
            )
            return 0.0
        both = grads is not None and row_grads is not None
        return error_of_row([expected, grads if both else ()], [found, row_grads if both else ()], factor)

    def _run(self, inputs: list[Any]) -> tuple[Any, list[Tensor] | None]:
        """What the hook makes of `inputs`, and gradients of their floating-point tensors."""
        leaves: list[Tensor] = []

        def leaf(x: Tensor) -> Tensor:
            if not _floats(x) or not torch.is_grad_enabled():
                return x.clone()
            leaves.append(x.detach().clone().requires_grad_())
            return leaves[-1].clone()  # hooks may write into it

        given = [map_tensors(x, leaf) for x in inputs]
        try:
            result = self.hook.function(self.hook.module, *given)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise UnsupportedModelError(
                f"{self.hook.describe()} fails with other numbers of tokens than the one that it got: {error}"
            ) from error
        result = self._result(given, result)
        own_parameters = {id(parameter) for parameter in self._layer.parameters()}
        outputs = [x for x in tensors_of(result) if x.requires_grad]
        if foreign := _trained(outputs) - {id(x) for x in leaves} - own_parameters:
            raise UnsupportedModelError(
                f"{self.hook.describe()} trains {len(foreign)} tensors that are no parameters of its layer, "
                "which a chunked step does not see: make them parameters of a module inside of the layer"
            )
        if not outputs or not leaves:
            return map_tensors(result, lambda x: x.detach()), None
        grads = torch.autograd.grad(outputs, leaves, [_grad(x) for x in outputs], allow_unused=True)
        grads_or_zeros = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)]
        return map_tensors(result, lambda x: x.detach()), grads_or_zeros


def _num_tensor_hooks(tensors: list[Tensor]) -> int:
    return sum(len(x._backward_hooks or ()) for x in tensors)  # torch 2.13


def _grad(x: Tensor) -> Tensor:
    """Gradient of an output; a function of the values, so that it is the same for a token in any piece."""
    return torch.cos(3 * x.detach())


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
