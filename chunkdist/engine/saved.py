"""What one forward of a group keeps for its backward, on the device or on the host: the input, the keys and
values of dependent runs, states, and what attention returned."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from torch import Tensor

from chunkdist.engine.group_input import Hidden, HostInput, Reading, tokens_of
from chunkdist.stores.attention_outputs import new_attention_outputs
from chunkdist.stores.by_chunk import TensorsByChunk
from chunkdist.stores.host_memory import HostMemory
from chunkdist.stores.kv_store import KVStore
from chunkdist.stores.state_relay import StateStore
from chunkdist.stream.stream import Chunk, Stream

Stores = list[KVStore | None]
"""K/V stores of a group's layers."""


class Saved:
    """What one forward keeps.

    Args:
        host: Where it waits; `None`: on the device.
        reads_retained: Whether the backward reads the input of retained chunks, too.
        keeps_attention: Whether what attention returned is kept: of all layers, none, or the global ones.
        num_above: Groups that run after this one. The last keeps everything on the device, since the backward
            begins with it.
    """

    def __init__(
        self,
        stream: Stream,
        num_layers: int,
        host: HostMemory | None,
        num_above: int,
        *,
        reads_retained: bool,
        keeps_attention: bool | Literal["global"],
    ) -> None:
        self.host = host if num_above else None
        """`None`: all stays on the device, and the node keeps the input."""
        self.states = [StateStore() for _ in range(num_layers)]
        self.attention = [new_attention_outputs(keeps_attention) for _ in range(num_layers)]
        """By layer; of retained chunks, whose graphs hold it, and of layers that do not attend, nothing is in
        there."""
        self.input: HostInput | None = None
        self._stream = stream
        self._num_groups_on_host = num_above
        self._reads_retained = reads_retained
        self._stores: dict[range, Stores] = {}
        self._places: list[tuple[TensorsByChunk[Any], int, Any]] = []
        """Where the tensors that the node keeps beside the input belong: the first token of their chunk, and
        key."""

    def keep_kv(self, run: range, stores: Stores) -> None:
        """The keys and values of a dependent run, which are not rebuilt."""
        self._stores[run] = stores

    def take_stores(self, run: range) -> Stores:
        """What was kept of a run, or nothing; from the host it is on its way."""
        stores = self._stores.pop(run, [])
        for store in stores:
            if store is not None:
                store.come_back()
        return stores

    def send(self, index: int, hidden: Tensor, retained: Collection[int]) -> None:
        """Chunk `index` has run: what waits for the backward begins to go to the host, with the first chunk
        the whole input (B, T, H).

        Args:
            retained: Chunks whose graphs hold their input.

        Raises:
            RuntimeError: the host has no room.
        """
        if self.host is None:
            return
        chunks = self._stream.chunks
        stores = next((stores for run, stores in self._stores.items() if index in run), [])
        attending = [store for store in stores if store is not None]
        if index == 0:
            num_stored = (self._stream.whole or self._stream).num_tokens
            kv_bytes = sum(store.bytes_per_token for store in attending) * num_stored
            outputs_bytes = sum(outputs.bytes_at(0) for outputs in self.attention if outputs is not None)
            outputs_bytes = outputs_bytes // chunks[0].num_tokens * self._stream.num_tokens
            waiting = hidden.nbytes + kv_bytes + outputs_bytes
            self.host.require(self._num_groups_on_host * waiting, hidden)
            read = [chunk for i, chunk in enumerate(chunks) if self._reads_retained or i not in retained]
            self.input = HostInput(self.host, hidden, read)
        for tensors in self._tensors:
            tensors.send(chunks[index].start, self.host)
        for store in attending:
            store.send(self._stream.in_whole(chunks[index]), self.host)

    def settle(self) -> None:
        """What the device is given from now on runs after all copies."""
        if self.host is not None:
            self.host.settle()

    def leave_device(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """After the last chunk: what has been sent is on the host alone. Returns what the node is to save:
        input, states and what attention returned, of which autograd lets go after the backward."""
        if self.host is None:
            taken = [
                ((tensors, position, key), x)
                for tensors in self._tensors
                for (position, key), x in tensors.take().items()
                if isinstance(x, Tensor)
            ]
            self._places = [place for place, _ in taken]
            return hidden, *(x for _, x in taken)
        self.settle()
        for store in (store for stores in self._stores.values() for store in stores):
            if store is not None:
                store.leave_device()
        return ()

    def leaf(self, hidden: Hidden, chunk: Chunk) -> Tensor:
        """Where the graph of a cell begins. Graphs that are kept hold no view of an input that leaves."""
        tokens = tokens_of(hidden, chunk)
        if self.host is not None and isinstance(hidden, Tensor):
            tokens = tokens.clone()
        return tokens.detach().requires_grad_(hidden.requires_grad)

    def come_back(self, saved: Sequence[Tensor]) -> Hidden:
        """Before the backward: the group's input, and all else in its place.

        Args:
            saved: What `leave_device` returned.

        Raises:
            RuntimeError: the input was on the host, from where it comes once, and has come.
        """
        if saved:
            hidden, *others = saved
            for (tensors, position, key), x in zip(self._places, others, strict=True):
                tensors.put(position, key, x)
            return hidden
        if self.input is None:
            raise RuntimeError(
                "a second backward through the same forward, but what waits on the host is given back after "
                "the first: call backward once, or write offload='none'"
            )
        taken, self.input = self.input, None
        return taken

    @contextmanager
    def read_back(self, hidden: Hidden, sampled: Sequence[int], *, num_rebuilt: int) -> Iterator[None]:
        """Around the backward; afterwards nothing is held, and nothing waits on the host.

        Args:
            hidden: The group's input.
            sampled: The chunks that are backpropagated, ascending.
            num_rebuilt: Layers of which the chunks that they read are run before them, one by one, where K/V
                were not kept: the last one up to its attention.

        Raises:
            RuntimeError: something has not come back as it went.
        """
        if isinstance(hidden, HostInput):
            hidden.expect(self._reading_order(sampled, num_rebuilt))
        try:
            yield
            if self.host is not None:
                self.host.verify()
        finally:
            self.settle()
            for tensors in self._tensors:
                tensors.clear()
            if self.host is not None:
                self.host.forget_comparisons()
                self._stores = {}

    @property
    def _tensors(self) -> list[TensorsByChunk[Any]]:
        return [tensors for tensors in (*self.states, *self.attention) if tensors is not None]

    def _reading_order(self, sampled: Sequence[int], num_rebuilt: int) -> Iterator[Reading]:
        chunks = self._stream.chunks
        rebuilt: list[TensorsByChunk[Any]] = [*self.states[:num_rebuilt]]
        rebuilt += [outputs for outputs in self.attention[: num_rebuilt - 1] if outputs is not None]
        for run in reversed(self._stream.runs()):
            if num_rebuilt and run not in self._stores:
                yield from ((chunks[i], rebuilt) for i in run if self._stream.is_read_later(i, sampled))
            yield from ((chunks[i], self._tensors) for i in reversed(run) if i in sampled)
