"""Blocks of host memory: what is cut of them, who gets their pages, and when those are unpinned."""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from chunkdist.stores.host_blocks import PAGE_BYTES, Block
from chunkdist.stores.host_memory import Copies
from tests.helpers.models import batch, gradients, tiny_llama
from tests.stores.test_host_memory import chunked, memory_of


class Driver:
    """Stands in for the CUDA runtime: which addresses are pinned."""

    def __init__(self) -> None:
        self.pinned: dict[int, int] = {}
        self.num_calls = 0
        self.waited = False

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:
        self.num_calls += 1
        if any(address < end and begin < address + num_bytes for begin, end in self.pinned.items()):
            return 712
        self.pinned[address] = address + num_bytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        assert self.waited, "a copy may be under way"
        del self.pinned[address]
        return 0

    def synchronize(self) -> None:
        self.waited = True


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    driver = Driver()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    yield driver
    gc.collect()


def pinned_block(driver: Driver, num_bytes: int) -> Block:
    return Block(num_bytes, stream=driver)  # type: ignore[arg-type]


def test_slabs_are_cut_given_back_and_joined() -> None:
    block = Block(4 * PAGE_BYTES)
    slabs = [block.cut(PAGE_BYTES) for _ in range(4)]
    assert block.cut(1) is None
    for index in (2, 0):
        block.give_back(slabs[index])  # type: ignore[arg-type]
    assert block.idle_bytes == 2 * PAGE_BYTES
    assert block.cut(2 * PAGE_BYTES) is None, "they are not neighbours"
    block.give_back(slabs[1])  # type: ignore[arg-type]
    slab = block.cut(3 * PAGE_BYTES)
    assert slab is not None
    assert (slab.begin, slab.end) == (0, 3 * PAGE_BYTES)
    slab.memory.fill_(7)
    assert block.memory.sum(dtype=torch.int64) == 7 * 3 * PAGE_BYTES


def test_pages_are_not_for_forks() -> None:
    block = Block(8 * PAGE_BYTES)
    address = block.memory.data_ptr()
    assert address % PAGE_BYTES == 0
    areas = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)
    (flags,) = (
        re.search(r"VmFlags:(.*)", area)[1].split()  # type: ignore[index]
        for area in areas
        if area and int(area.split("-")[0], 16) <= address < int(area.split("-")[1].split()[0], 16)
    )
    assert "dc" in flags, "do not copy on fork"


def test_a_block_that_dies_is_unpinned_once_nothing_waits_in_it(driver: Driver) -> None:
    block = pinned_block(driver, 2 * PAGE_BYTES)
    slab = block.cut(PAGE_BYTES)
    del block
    assert len(driver.pinned) == 1
    del slab
    assert not driver.pinned


def test_a_fork_does_not_unpin(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    block = pinned_block(driver, PAGE_BYTES)
    monkeypatch.setattr("chunkdist.stores.host_blocks.os", SimpleNamespace(getpid=lambda: -1))
    del block
    assert len(driver.pinned) == 1


def test_pages_that_are_pinned_already(driver: Driver) -> None:
    driver.cudaHostRegister(0, 2**62, 0)
    with pytest.raises(RuntimeError, match=r"CUDA error 712\): these pages are pinned already"):
        pinned_block(driver, PAGE_BYTES)


@pytest.mark.parametrize("schedule", [{}, {"rebuild_kv": False}])
def test_a_model_that_is_deleted_gives_its_memory_back(
    driver: Driver, monkeypatch: pytest.MonkeyPatch, schedule: dict[str, Any]
) -> None:
    """Not unchunked: its host memory is all pinned by few calls, and unpinned."""

    def allocate(self: Copies, num_bytes: int, *, fake: bool) -> Block:
        return pinned_block(driver, num_bytes)

    monkeypatch.setattr(Copies, "allocate", allocate)
    model: Any = chunked(tiny_llama(num_layers=4, hidden_size=512), "host", **schedule)
    gradients(model, batch(num_tokens=7 * 12))
    loss = model(**batch(num_tokens=50), use_cache=False).loss
    assert memory_of(model).used_bytes > 0
    assert driver.num_calls <= 6, "36 inputs, and twice as many keys and values"
    del model, loss
    gc.collect()
    assert not driver.pinned


def test_one_allocation_is_for_all_that_is_to_come(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    real = Copies.allocate

    def allocate(self: Copies, num_bytes: int, *, fake: bool) -> Block:
        sizes.append(num_bytes)
        return real(self, num_bytes, fake=fake)

    monkeypatch.setattr(Copies, "allocate", allocate)
    model = chunked(tiny_llama(num_layers=4, hidden_size=512), "host")
    gradients(model, batch(num_tokens=7 * 12))
    assert sizes == [3 * 12 * 7 * 512 * 8]
    gradients(model, batch(num_tokens=7 * 16))
    assert sizes[1:] == [3 * 4 * 7 * 512 * 8], "what is missing"
