"""Peaks begin with an empty cache, times with a warm one: seen on a stand-in for the allocator of a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from chunkdist.bench import timing


class Allocator:
    """Of `torch.cuda`, what timing asks for: a call that needs a block asks the device unless it is cached.

    A call that is `greedy` asks each time, as near the limit of memory.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.is_cached = False
        self.num_asked = 0
        self.num_retried = 0
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        for name in ("synchronize", "reset_peak_memory_stats"):
            monkeypatch.setattr(torch.cuda, name, lambda name=name: self.calls.append(name))
        monkeypatch.setattr(torch.cuda, "empty_cache", self._empty)
        monkeypatch.setattr(torch.cuda, "memory_stats", self._stats)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 5)
        monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 7)

    def _empty(self) -> None:
        self.calls.append("empty_cache")
        self.is_cached = False

    def _stats(self) -> dict[str, int]:
        return {"num_device_alloc": self.num_asked, "num_alloc_retries": self.num_retried}

    def step(self, *, greedy: bool = False) -> Callable[[], None]:
        def run() -> None:
            self.calls.append("step")
            if greedy:
                self.num_retried += 3
            elif not self.is_cached:
                self.num_asked += 2
                self.is_cached = True

        return run


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Allocator:
    return Allocator(monkeypatch)


def test_a_timed_step_has_a_warm_cache(gpu: Allocator) -> None:
    """After a step that warms up, nothing is emptied, nothing is run again, and the peak is the warm-up's."""
    step = gpu.step()
    peak = timing.peak_of(step)
    assert peak == {"peak_allocated_bytes": 5, "peak_reserved_bytes": 7}
    assert gpu.calls == ["synchronize", "empty_cache", "reset_peak_memory_stats", "step", "synchronize"]
    gpu.calls.clear()
    cost = timing.cost_of(step)
    assert gpu.calls == ["synchronize", "step", "synchronize"]
    assert (cost.num_reruns, cost.num_device_allocations) == (0, 0)


def test_a_step_that_asked_the_device_for_memory_is_run_again(
    gpu: Allocator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the first one is not the one that is timed."""
    clock = iter([0.0, 9.0, 10.0, 12.0])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    cost = timing.cost_of(gpu.step())
    assert gpu.calls.count("step") == 2
    assert (cost.num_reruns, cost.num_device_allocations, cost.wall_s) == (1, 0, 2.0)


def test_it_is_run_again_once_at_most_and_says_so(gpu: Allocator) -> None:
    cost = timing.cost_of(gpu.step(greedy=True))
    assert gpu.calls.count("step") == 2
    assert (cost.num_reruns, cost.num_device_allocations) == (1, 3)


def test_it_is_not_run_again_where_that_takes_too_long(gpu: Allocator) -> None:
    cost = timing.cost_of(gpu.step(), max_reruns=0)
    assert gpu.calls.count("step") == 1
    assert (cost.num_reruns, cost.num_device_allocations) == (0, 2)


def test_a_cpu_has_no_allocator_to_ask(gpu: Allocator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    step = gpu.step(greedy=True)
    cost, peak = timing.cost_of(step), timing.peak_of(step)
    assert gpu.calls == ["step", "step"]
    assert (cost.num_reruns, cost.num_device_allocations) == (0, 0)
    assert peak == {}
