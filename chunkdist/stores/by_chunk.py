"""Tensors of one layer that wait for the backward, by chunk: on the device or on the host."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

from torch import Tensor

from chunkdist.stores.host_memory import HostMemory, HostTensor

Key = TypeVar("Key", bound=Hashable)


class TensorsByChunk(Generic[Key]):
    """By the first token of the chunk whose backward needs them, and a key each."""

    def __init__(self) -> None:
        self._tensors: dict[int, dict[Key, Tensor | HostTensor]] = {}

    def keep(self, position: int, tensors: dict[Key, Tensor]) -> None:
        """Keeps what the chunk that starts at `position` needs."""
        self._tensors[position] = {**tensors}

    def at(self, position: int) -> dict[Key, Tensor]:
        """What is kept for the chunk that starts at `position`, on its device; it stays kept."""
        kept = self._tensors.get(position, {})
        return {key: x if isinstance(x, Tensor) else x.get() for key, x in kept.items()}

    def bytes_at(self, position: int) -> int:
        """Bytes on the device of what is kept for the chunk that starts at `position`."""
        return sum(x.nbytes for x in self._tensors.get(position, {}).values() if isinstance(x, Tensor))

    def send(self, position: int, host: HostMemory) -> None:
        """Begins to copy the chunk's tensors to the host."""
        kept = self._tensors.get(position, {})
        self._tensors[position] = {
            key: host.put(x) if isinstance(x, Tensor) else x for key, x in kept.items()
        }

    def expect(self, position: int) -> None:
        """Begins to copy them back: `at` comes next."""
        for x in self._tensors.get(position, {}).values():
            if isinstance(x, HostTensor):
                x.start()

    def leave(self, position: int) -> None:
        """Undoes `expect`."""
        for x in self._tensors.get(position, {}).values():
            if isinstance(x, HostTensor):
                x.leave()

    def take(self) -> dict[tuple[int, Key], Tensor | HostTensor]:
        """Lets go of everything: by the first token of the chunk, and key."""
        taken, self._tensors = self._tensors, {}
        return {(position, key): x for position, kept in taken.items() for key, x in kept.items()}

    def put(self, position: int, key: Key, x: Tensor) -> None:
        """One that was taken comes back."""
        self._tensors.setdefault(position, {})[key] = x

    def clear(self) -> None:
        """Lets go of everything."""
        self._tensors = {}

    def forget(self, position: int) -> None:
        """Lets go of the chunk's tensors."""
        self._tensors.pop(position, None)
