"""What waits for the backward waits on the host (`ChunkConfig.offload="host"`): memory, copies, guard.

`HostMemory.put` begins the copy of a tensor out and returns a `HostTensor`; `HostTensor.start` begins the
copy back, `get` gives the tensor. Memory comes in slabs, cut of blocks that are allocated once
(`chunkdist.stores.host_blocks`), and goes from one tensor to the next: across groups, steps and streams.

What always holds, on a CUDA device: all copies run one after another on one stream of their own, so a slab is
never written before what was in it has been read. A copy starts when the device is done with all that was
queued before, so it reads what was written and writes where nothing is read. What the device is given after
`get` or `settle` runs after the copies. On other devices copies are done at once; all else is the same.

Nothing stale is trained on: the sum of a tensor's bits is taken before it leaves and again when it is back,
and `verify` raises when they differ.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from chunkdist.stores.free_memory import free_host_bytes
from chunkdist.stores.host_blocks import PAGE_BYTES, Block, Slab

GIB = 2**30
_BLOCK_BYTES = GIB
"""The most that is allocated at once for what is known to come."""
_USABLE_SHARE = 0.95
"""Share of the free host memory that may be used: at its end the kernel kills processes."""
_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


class HostMemory:
    """The blocks of one model, of all devices that its tensors come from.

    Attributes:
        allocating: True while a block is allocated, so that who counts tensors can tell blocks from others.
    """

    def __init__(self) -> None:
        self.allocating = False
        self._pools: dict[tuple[torch.device, bool], _Pool] = {}

    @property
    def held_bytes(self) -> int:
        """Bytes of all blocks. They grow to what the longest stream needs, and stay until `close`."""
        return sum(pool.held_bytes for pool in self._pools.values())

    @property
    def used_bytes(self) -> int:
        """Bytes of the slabs in which a tensor waits."""
        return sum(pool.held_bytes - pool.idle_bytes for pool in self._pools.values())

    def put(self, x: Tensor) -> HostTensor:
        """Begins to copy `x` out. It must not be changed before `settle`.

        Raises:
            RuntimeError: there is no memory for it.
        """
        return HostTensor(self._pool_of(x), x.detach().contiguous())

    def require(self, num_bytes: int, like: Tensor) -> None:
        """Raises where the host has no room for `num_bytes` more of tensors like `like`. Allocates nothing
        but makes what is allocated next large enough for all of them.

        Raises:
            RuntimeError: what is needed, and what is free.
        """
        self._pool_of(like).require(num_bytes)

    def settle(self) -> None:
        """What the device is given from now on runs after all copies."""
        for pool in self._pools.values():
            pool.settle()

    def verify(self) -> None:
        """Waits for the device.

        Raises:
            RuntimeError: a tensor has not come back as it went, since the last call.
        """
        for pool in self._pools.values():
            pool.verify()

    def forget_comparisons(self) -> None:
        """Those of a backward that has failed anyway."""
        for pool in self._pools.values():
            pool.differences.clear()

    def close(self) -> None:
        """Gives the memory back, at once or as soon as nothing waits in it."""
        for pool in self._pools.values():
            pool.close()
        self._pools = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> HostMemory:
        return HostMemory()

    def _pool_of(self, x: Tensor) -> _Pool:
        key = x.device, isinstance(x, FakeTensor)
        if key not in self._pools:
            self._pools[key] = _Pool(self, *key)
        return self._pools[key]

    @contextmanager
    def _allocation(self) -> Iterator[None]:
        self.allocating = True
        try:
            yield
        finally:
            self.allocating = False


class HostTensor:
    """A tensor that waits on the host. Its slab goes back when this object dies."""

    def __init__(self, pool: _Pool, x: Tensor) -> None:
        self.shape, self.dtype, self.device = x.shape, x.dtype, x.device
        self._pool = pool
        slab = pool.take(x.nbytes)
        weakref.finalize(self, pool.give_back, slab).atexit = False
        self._memory = slab.memory[: x.nbytes].view(x.dtype).view(x.shape)
        self._sum = pool.bit_sum(x)
        pool.copy_out(self._memory, x)
        self._arriving: tuple[Tensor, Any] | None = None

    def start(self, into: Tensor | None = None) -> None:
        """Begins to copy it back: to new memory of the device, or into a tensor of its shape."""
        if self._arriving is None:
            target = torch.empty(self.shape, dtype=self.dtype, device=self.device) if into is None else into
            self._arriving = target, self._pool.copies.run(target, self._memory)

    def get(self) -> Tensor:
        """It, on its device. A second call copies once more."""
        self.start()
        assert self._arriving is not None
        (x, event), self._arriving = self._arriving, None
        self._pool.copies.wait(event)
        self._pool.compare(self._sum, x)
        return x

    def leave(self) -> None:
        """Undoes `start`: what it was copied to is not wanted."""
        if self._arriving is not None:
            self._pool.copies.wait(self._arriving[1])
            self._arriving = None


class _Pool:
    """Slabs for the tensors of one device. Fake tensors take no memory and have no content: nothing is
    refused, pinned or compared."""

    def __init__(self, owner: HostMemory, device: torch.device, fake: bool) -> None:
        self.copies = Copies(device, on_stream=device.type == "cuda" and not fake)
        self.differences: list[Tensor] = []
        self._owner = owner
        self._fake = fake
        self._blocks: list[Block] = []
        self._to_come = 0
        """Bytes that are known to be wanted, beyond the blocks."""
        self._leaving: list[tuple[Tensor, Any]] = []
        """What is being copied out, and the events at which that is done."""
        self._closed = False

    @property
    def held_bytes(self) -> int:
        return sum(block.num_bytes for block in self._blocks)

    @property
    def idle_bytes(self) -> int:
        return sum(block.idle_bytes for block in self._blocks)

    def take(self, num_bytes: int) -> Slab:
        """Whole pages of a block, or else of a new one, which is made large enough for what is to come."""
        size = max(1, -(-num_bytes // PAGE_BYTES)) * PAGE_BYTES
        for block in self._blocks:
            if (slab := block.cut(size)) is not None:
                return slab
        block_bytes = max(1, min(_BLOCK_BYTES, self._to_come) // size) * size
        self.require(block_bytes, of_all_ranks=True, exactly=True)
        with self._owner._allocation():
            block = self.copies.allocate(block_bytes, fake=self._fake)
        self._to_come = max(0, self._to_come - block_bytes)
        self._blocks.append(block)
        slab = block.cut(size)
        assert slab is not None
        return slab

    def give_back(self, slab: Slab) -> None:
        slab.block.give_back(slab)
        if self._closed:
            self._drop_idle()

    def require(self, num_bytes: int, *, of_all_ranks: bool = False, exactly: bool = False) -> None:
        """Compares with this rank's part of what is free: all ranks may grow at once.

        Args:
            of_all_ranks: Compare with all that is free.
            exactly: Idle memory is of no use.
        """
        missing = num_bytes if exactly else num_bytes - self.idle_bytes
        if not exactly:
            self._to_come = max(0, missing)
        if self._fake or missing <= 0:
            return
        num_ranks = 1 if of_all_ranks else None
        free = int(free_host_bytes(num_ranks=num_ranks) * _USABLE_SHARE)
        if missing > free and self.idle_bytes:  # in pieces that are not wanted any more
            self._drop_idle()
            missing = num_bytes if exactly else num_bytes - self.idle_bytes
            free = int(free_host_bytes(num_ranks=num_ranks) * _USABLE_SHARE)
        if missing > free:
            raise RuntimeError(
                f"offload='host' needs {missing / GIB:.2f} GiB more of host memory for what waits for the "
                f"backward, and {free / GIB:.2f} GiB are free for it (control groups counted, and 5 % left "
                "free): write more layers_per_group with rebuild_kv=True, or shorter sequences, or "
                "offload='none'"
            )

    def copy_out(self, target: Tensor, x: Tensor) -> None:
        self._leaving = [(y, event) for y, event in self._leaving if not self.copies.is_done(event)]
        self._leaving.append((x, self.copies.run(target, x)))

    def settle(self) -> None:
        self.copies.wait_all()
        self._leaving = []

    def bit_sum(self, x: Tensor) -> Tensor | None:
        """The sum of the tensor's bits, taken for integers of up to eight bytes, modulo 2^64."""
        if self._fake:
            return None
        data = x.contiguous().view(-1).view(torch.uint8)
        size = next(size for size in _WORDS if not (data.numel() % size or data.storage_offset() % size))
        return data.view(_WORDS[size]).sum(dtype=torch.int64)

    def compare(self, expected: Tensor | None, x: Tensor) -> None:
        found = self.bit_sum(x)
        if expected is not None and found is not None:
            self.differences.append(found != expected)

    def verify(self) -> None:
        differences, self.differences = self.differences, []
        if differences and bool(torch.stack(differences).any()):
            raise RuntimeError(
                "offload='host': what came back from the host is not what went there: a copy was lost or the "
                "memory was overwritten; the step must not be used"
            )

    def close(self) -> None:
        self._closed = True
        self._drop_idle()

    def _drop_idle(self) -> None:
        """Lets go of the blocks in which nothing waits."""
        self._blocks = [block for block in self._blocks if block.idle_bytes < block.num_bytes]


class Copies:
    """Copies between one device and the host, and the host's memory for them: all that is particular to CUDA.

    Args:
        on_stream: Pinned memory, and a stream of their own; else copies are done when `run` returns.
    """

    def __init__(self, device: torch.device, *, on_stream: bool) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if on_stream else None

    def run(self, target: Tensor, source: Tensor) -> Any:
        """A copy, after all that the device has been given so far; returns what `wait` and `is_done` take."""
        if self._stream is None:
            target.copy_(source)
            return None
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            return self._stream.record_event()

    def wait(self, event: Any) -> None:
        """What the device is given from now on runs after that copy."""
        if event is not None:
            torch.cuda.current_stream(self._device).wait_event(event)

    def wait_all(self) -> None:
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def is_done(self, event: Any) -> bool:
        return event is None or bool(event.query())

    def allocate(self, num_bytes: int, *, fake: bool) -> Block:
        """Memory for these copies.

        Raises:
            RuntimeError: the system refuses.
        """
        return Block(num_bytes, stream=self._stream, fake=fake)
