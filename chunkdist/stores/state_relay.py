"""State of a layer other than keys and values, handed on from chunk to chunk, and its gradient handed back.

Linear-attention, state-space and convolution layers of transformers keep such state in a `Cache`, through one
set of methods. In a cell they get a `StateRelay` in the cache's place: it gives them the state at the chunk's
start and takes the state at its end, and no tensor is changed in place. Backwards, the state at the chunk's
start is a leaf; its gradient is that of the state at the end of the chunk before, to which each chunk that
goes on from it, as branches with a shared prefix do, adds its own.

Keys and values are not its business: `update` gives a chunk's own back, and the chunked attention adds the
prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import functional as F

from chunkdist.errors import UnsupportedModelError
from chunkdist.stores.by_chunk import TensorsByChunk
from chunkdist.stream.stream import Chunk

CACHE_ARGUMENTS = ("past_key_values", "past_key_value", "layer_past", "cache_params")
"""Names under which layers take their cache."""

StateKey = tuple[str, int, int]
"""Kind of state, index of the layer, and of the state in it."""


class StateStore(TensorsByChunk[StateKey]):
    """One layer's state at the chunks' starts, kept from the forward to the backward, and, in the backward,
    the gradients of the state at the ends of chunks that are to come."""

    def __init__(self) -> None:
        super().__init__()
        self.grads: dict[int, dict[StateKey, Tensor]] = {}
        """By the end of the chunk, summed over the chunks that go on from it; in fp32 unless the state is
        wider."""

    def clear(self) -> None:
        super().clear()
        self.grads = {}

    def relay(self, chunk: Chunk, before: int | None = None) -> StateRelay:
        """The layer's cache in the cell of a chunk; under `torch.no_grad`, one that tracks no gradient.

        Args:
            before: The end of the chunk from which this one goes on; `None`: where this one begins.
        """
        return StateRelay(self, chunk, self.at(chunk.start), chunk.start if before is None else before)


class StateRelay:
    """What a layer sees as its cache in one cell.

    Args:
        start: The state before the cell's first token; empty where a sequence begins.
        before: The end of the chunk that has left it.
    """

    def __init__(self, store: StateStore, chunk: Chunk, start: dict[StateKey, Tensor], before: int) -> None:
        self._store = store
        self._chunk, self._before = chunk, before
        self._dtypes = {key: x.dtype for key, x in start.items()}
        self._leaves = {key: self._leaf(x) for key, x in start.items()}
        self.ends: dict[StateKey, tuple[Tensor, torch.dtype]] = {}
        """The state after the cell's last token, and the dtype in which the layer has it."""

    @property
    def used(self) -> bool:
        """Whether the layer keeps state."""
        return bool(self.ends)

    def hand_on(self, starts: Sequence[int]) -> None:
        """After a forward: the state at the cell's end is that at the starts of the chunks that go on from
        it."""
        if not starts:
            return
        states = {key: x.detach().to(dtype, copy=True) for key, (x, dtype) in self.ends.items()}
        for start in starts:
            self._store.keep(start, states)

    def forget(self) -> None:
        """The state at the cell's start is not needed again."""
        self._store.forget(self._chunk.start)

    def loose_ends(self) -> list[tuple[Tensor, Tensor]]:
        """States at the cell's end that take part in its backward, each with its gradient."""
        grads = self._store.grads.get(self._chunk.end, {})
        found = [(x, grads.get(key)) for key, (x, _) in self.ends.items() if x.requires_grad]
        return [(x, grad.to(x.dtype)) for x, grad in found if grad is not None]

    def hand_back(self) -> None:
        """Once the cell's backward has run: the gradient of its first state is added to that of the last one
        of the chunk before."""
        self._store.grads.pop(self._chunk.end, None)
        found = {key: leaf.grad for key, leaf in self._leaves.items() if leaf.grad is not None}
        total = self._store.grads.setdefault(self._before, found)
        if total is not found:
            for key, grad in found.items():
                total[key] = total[key] + grad if key in total else grad

    # From here, the methods of transformers' `Cache` (5.17 to 5.23) that layers call.

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        return keys, values

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return any(
            layer_idx in (None, layer) and state_idx in (None, state) for _, layer, state in self._leaves
        )

    def is_recording_past(self, layer_idx: int) -> bool:
        return (
            True  # a chunk of one token goes through `update_conv_state`, too, not through an in-place kernel
        )

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self._given(("conv", layer_idx, state_idx))

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self._given(("recurrent", layer_idx, state_idx))

    def update_conv_state(
        self,
        conv_states: Tensor,
        layer_idx: int,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        **_: Any,
    ) -> Tensor:
        """The inputs (..., T) of a convolution behind the last ones of the chunk before; keeps the last."""
        key = ("conv", layer_idx, state_idx)
        size = conv_states.shape[-1] if conv_kernel_size is None else conv_kernel_size
        before, leaf = self._given(key), self._leaves.get(key)
        tail = _wide(conv_states[..., -size:])
        if before is None or leaf is None:
            tail = F.pad(tail, (size - tail.shape[-1], 0))
        else:
            tail = torch.cat([leaf, tail], dim=-1)[..., -size:]
            conv_states = torch.cat([before, conv_states], dim=-1)
        self.ends[key] = tail, conv_states.dtype
        return conv_states

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **_: Any
    ) -> Tensor:
        self.ends["recurrent", layer_idx, state_idx] = recurrent_states, recurrent_states.dtype
        return recurrent_states

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("_"):
            raise AttributeError(name)
        raise UnsupportedModelError(
            f"a layer asks its cache for {name}, which is not relayed between chunks: it keeps state in a "
            "way of its own"
        )

    def _leaf(self, state: Tensor) -> Tensor:
        """In at least fp32, so that its gradient is."""
        if not state.is_floating_point():
            return state
        return _wide(state).detach().requires_grad_(torch.is_grad_enabled())

    def _given(self, key: StateKey) -> Tensor | None:
        leaf = self._leaves.get(key)
        return None if leaf is None else leaf.to(self._dtypes[key], copy=True)  # some layers write into it


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32)) if x.is_floating_point() else x
