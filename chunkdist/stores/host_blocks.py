"""Host memory in blocks: pages of their own, of which slabs are cut, and which are pinned as long as the
block lives.

Pinning costs a call of the driver and a fault for each page, so a block holds many tensors. A block that dies
gives its pages back, however that came about: pages that are freed while the driver still knows them are
refused when they are next pinned (CUDA error 712).

Processes that this one forks (a data loader's workers) do not get these pages: what is pinned would be copied
for them at once.
"""

from __future__ import annotations

import mmap
import os
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PAGE_BYTES = 4096


class Block:
    """One allocation, (num_bytes,) bytes.

    Args:
        stream: Pinned, for copies on this stream; `None`: not pinned.
        fake: Takes no memory: for fake tensors.

    Raises:
        RuntimeError: the driver refuses to pin it.
    """

    def __init__(
        self, num_bytes: int, *, stream: torch.cuda.Stream | None = None, fake: bool = False
    ) -> None:
        self.num_bytes = num_bytes
        self.memory = torch.empty(num_bytes, dtype=torch.uint8) if fake else _own_pages(num_bytes)
        self._free = [(0, num_bytes)]
        """Begin and end of what no tensor waits in; ascending, with gaps between."""
        if stream is not None:
            _pin(self.memory)
            weakref.finalize(self, _unpin, self.memory, stream, os.getpid()).atexit = False

    @property
    def idle_bytes(self) -> int:
        return sum(end - begin for begin, end in self._free)

    def cut(self, num_bytes: int) -> Slab | None:
        """The first idle bytes that are enough; `None`: there are none."""
        for index, (begin, end) in enumerate(self._free):
            if end - begin >= num_bytes:
                self._free[index : index + 1] = [(begin + num_bytes, end)] if end - begin > num_bytes else []
                return Slab(self, begin, begin + num_bytes)
        return None

    def give_back(self, slab: Slab) -> None:
        joined: list[tuple[int, int]] = []
        for begin, end in sorted([*self._free, (slab.begin, slab.end)]):
            if joined and begin <= joined[-1][1]:
                joined[-1] = joined[-1][0], max(end, joined[-1][1])
            else:
                joined.append((begin, end))
        self._free = joined


@dataclass(frozen=True)
class Slab:
    """A part of a block, in which one tensor waits. Keeps the block alive."""

    block: Block
    begin: int
    end: int

    @property
    def memory(self) -> Tensor:
        """Its bytes, a view."""
        return self.block.memory[self.begin : self.end]


def _own_pages(num_bytes: int) -> Tensor:
    """Pages of nobody else. torch's pinned memory would be rounded up to a power of two (pytorch issue
    95823), and the C library's pages are shared with other memory."""
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):
        try:
            pages.madvise(getattr(mmap, advice))
        except (AttributeError, OSError):  # another system, or a kernel without it
            continue
    return torch.frombuffer(pages, dtype=torch.uint8)


def _pin(memory: Tensor) -> None:
    cudart: Any = torch.cuda.cudart()
    code = int(cudart.cudaHostRegister(memory.data_ptr(), memory.numel(), 0))
    if not code:
        return
    advice = {
        712: "these pages are pinned already, by memory that was freed and not unpinned: start a new process",
        2: "the driver has no memory for it: end other processes, or train on shorter sequences",
    }.get(code, "raise the limit of locked memory (ulimit -l)")
    raise RuntimeError(
        f"offload='host': the driver refused to pin {memory.numel() / 2**20:.0f} MiB of host memory (CUDA "
        f"error {code}): {advice}, or write offload='none'"
    )


def _unpin(memory: Tensor, stream: torch.cuda.Stream, process: int) -> None:
    """Holds the pages until it has run."""
    if os.getpid() != process:  # a fork has neither the pages nor a device
        return
    stream.synchronize()
    cudart: Any = torch.cuda.cudart()
    cudart.cudaHostUnregister(memory.data_ptr())
