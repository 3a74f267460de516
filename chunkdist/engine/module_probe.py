"""Asks a module inside of a layer, whose code is not known, whether it does with the tokens of a whole row
what it does with fewer.

`LayerProbe` has compared a few tokens in chunks with the same at once. What a module does from some number of
tokens on, or from some position on, it cannot see. So what the module is called with in the first pass is
noted for some chunks, and repeated until it is as long as a row: results must be those of the noted tokens.
Modules that call attention inside are left out.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from chunkdist.engine.hook_probe import NOTED_BYTES
from chunkdist.engine.layer import GroupLayer
from chunkdist.engine.probe import other_weights, without_dropout
from chunkdist.engine.token_errors import error_of_row
from chunkdist.engine.token_pieces import joined, map_tensors, repeated, tensors_of, token_dims
from chunkdist.errors import UnsupportedModelError
from chunkdist.recovery import is_out_of_memory

logger = logging.getLogger("chunkdist")

_SLACK = 10
"""Times the tolerance of a hook: products of matrices are summed in another order with more rows."""


class ModuleNotes:
    """Stands in the place of a module's forward for a pass and its rerun, and notes what it is called with.

    Args:
        path: Of the module, for messages.
        row_tokens: What the module would be called with without chunks.
    """

    def __init__(self, module: nn.Module, path: str, layer: GroupLayer, row_tokens: int) -> None:
        self._module, self._path, self._layer, self._row_tokens = module, path, layer, row_tokens
        self._forward: Any = module.forward
        self._calls: list[tuple[int, list[Any]]] = []
        self._num_bytes = 0
        self._is_over = False
        self._attends = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        cell = None if self._layer.state is None else self._layer.state.cell
        if self._is_over or cell is None:
            return self._forward(*args, **kwargs)
        inputs, num_calls = [args, kwargs], cell.num_calls
        if self._num_bytes <= NOTED_BYTES:
            self._num_bytes += sum(x.numel() * x.element_size() for x in tensors_of(inputs))
            self._calls.append(
                (cell.chunk.num_tokens, [map_tensors(x, lambda t: t.detach().clone()) for x in inputs])
            )
        result = self._forward(*args, **kwargs)
        self._attends |= cell.num_calls != num_calls
        return result

    @contextmanager
    def in_place(self) -> Iterator[None]:
        own = self._module.__dict__
        before = own.get("forward")
        own["forward"] = self
        try:
            yield
        finally:
            self._is_over = True
            if before is None:
                own.pop("forward", None)
            else:
                own["forward"] = before

    def check(self) -> None:
        """Raises `UnsupportedModelError` where the module makes something else of a whole row."""
        calls, self._calls = self._calls, []
        while (num_tokens := sum(n for n, _ in calls)) >= self._row_tokens:
            calls.pop()
        tensors = [tensors_of(inputs) for _, inputs in calls]
        if self._attends or not calls or len({len(x) for x in tensors}) > 1:
            return
        dims = [token_dims(calls, place) for place in range(len(tensors[0]))]
        if all(d is None for d in dims):
            return
        whole, factor = joined([inputs for _, inputs in calls], dims), self._row_tokens / num_tokens
        with (
            torch.no_grad(),
            torch.autocast(tensors[0][0].device.type, enabled=False),
            without_dropout(self._module),
            other_weights(self._module, widened=True, moved=False),
        ):
            try:
                expected, found = self._run(whole), self._run(repeated(whole, dims, factor))
            except Exception as error:
                if not is_out_of_memory(error):
                    raise UnsupportedModelError(
                        f"{self._path} fails with other numbers of tokens than a chunk's: {error}"
                    ) from error
                logger.warning(
                    "chunkdist: there is not enough memory to ask %s whether it does the same with all %d "
                    "tokens",
                    self._path,
                    self._row_tokens,
                )
                return
            difference = error_of_row(expected, found, factor)
        if not difference <= _SLACK:
            raise UnsupportedModelError(
                f"{self._path} does not do the same with any number of tokens: inside of a layer it is "
                "called with one chunk at a time, and makes something else of it than of a whole row of "
                f"{self._row_tokens}"
            )

    def _run(self, inputs: list[Any]) -> Any:
        args, kwargs = (map_tensors(x, _widened) for x in inputs)
        return self._module(*args, **kwargs)


def _widened(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32)) if x.is_floating_point() else x.clone()
