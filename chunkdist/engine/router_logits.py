"""Router logits of a chunked forward: further outputs of a cell, for each token, with gradients of their own.

transformers (5.23) records them in forward hooks on the routers: each appends what its router returns to a
list of the collector that is active, if that has one for `router_logits`, and the decoder puts the list into
its outputs (`utils.output_capturing`, whose private names are used here alone). A chunked router runs once
for each chunk, without a graph, and again in the backward. So layers run with a collector of their own. What
is found in it is a part of the whole sequence's, and goes to the decoder's collector when all chunks have
run, as an output of the group's node.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY, _active_collector

from chunkdist.errors import UnsupportedModelError
from chunkdist.stream.padding import refuse_gradients_of_padding
from chunkdist.stream.stream import Chunk

_KEY = "router_logits"


def are_recorded(decoder: nn.Module) -> bool:
    """Whether transformers' hooks record router logits in the decoder, or in one inside of it."""
    models = [module for module in decoder.modules() if isinstance(module, PreTrainedModel)]
    return any(_KEY in _CAN_RECORD_REGISTRY.get(model) for model in models)


def are_wanted() -> bool:
    """Whether the decoder that runs now collects router logits."""
    return _KEY in (_active_collector.get() or {})


@contextmanager
def recorded(wanted: bool) -> Iterator[list[Tensor]]:
    """Inside, nothing reaches the collectors around; router logits are in the list, if they are wanted."""
    found: list[Tensor] = []
    token = _active_collector.set({_KEY: found} if wanted else {})
    try:
        yield found
    finally:
        _active_collector.reset(token)


def deliver(router_logits: Sequence[Tensor], mask_BT: Tensor | None) -> None:
    """Gives those of whole sequences to the decoder that runs now.

    Args:
        mask_BT: 0 for padding; `None`: there is none.
    """
    for x in router_logits:
        if mask_BT is not None:
            refuse_gradients_of_padding(x, mask_BT)
        _active_collector.get()[_KEY].append(x)


class WholeSequence:
    """Puts the router logits of all chunks together: (B x T, experts), or (B, T, ...), as routers return
    them.

    Args:
        num_rows, num_tokens: B and T of the whole sequence.
    """

    def __init__(self, num_rows: int, num_tokens: int) -> None:
        self._num_rows, self._num_tokens = num_rows, num_tokens
        self._whole: list[Tensor] = []

    def add(self, chunk: Chunk, parts: Sequence[Tensor]) -> None:
        """What the routers have returned for a chunk, in their order."""
        if chunk.start == 0:
            self._whole = [self._empty_like(part, chunk.num_tokens) for part in parts]
        if len(parts) != len(self._whole):
            raise UnsupportedModelError(
                "the model's routers run for some chunks only: their logits have gaps"
            )
        for whole, part in zip(self._whole, parts, strict=True):
            of_chunk(whole, chunk, self._num_rows).copy_(by_row(part.detach(), self._num_rows))

    def add_placeholders(self, parts: Sequence[Tensor]) -> None:
        """Adds zeros for the whole sequence, in the memory of one number each.

        Args:
            parts: What the routers have returned for the first token.
        """
        wholes = [self._empty_like(part.to("meta"), 1) for part in parts]
        self._whole += [part.new_zeros(()).expand(x.shape) for part, x in zip(parts, wholes, strict=True)]

    def take(self) -> tuple[Tensor, ...]:
        """All of them, once."""
        whole, self._whole = self._whole, []
        return tuple(whole)

    def _empty_like(self, part: Tensor, num_tokens: int) -> Tensor:
        expected = (self._num_rows * num_tokens,) if part.ndim == 2 else (self._num_rows, num_tokens)
        if part.shape[: len(expected)] != expected:
            raise UnsupportedModelError(
                f"a router returns logits of shape {tuple(part.shape)} for {self._num_rows} row(s) of "
                f"{num_tokens} tokens, not (all tokens, experts): write output_router_logits=False"
            )
        sizes = (self._num_rows * self._num_tokens,) if part.ndim == 2 else (self._num_rows, self._num_tokens)
        return part.new_empty(sizes + part.shape[len(sizes) :])


def by_row(x: Tensor, num_rows: int) -> Tensor:
    """(B x T, experts) as (B, T, experts); (B, T, ...) as it is."""
    return x.unflatten(0, (num_rows, -1)) if x.ndim == 2 else x


def of_chunk(whole: Tensor, chunk: Chunk, num_rows: int) -> Tensor:
    """A chunk's part, (B, T of the chunk, ...)."""
    return by_row(whole, num_rows)[:, chunk.start : chunk.end]
