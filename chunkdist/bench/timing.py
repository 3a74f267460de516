"""Seconds, bytes and rates, on a CPU and on CUDA."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from chunkdist.models.flops import StepFlops, num_active_parameters

MAX_RERUNS = 1
"""A step that asks the device for memory each time (near the limit, say) is not run for ever."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one call. `cpu_s` is of all threads of the process.

    Args:
        num_reruns: Calls before this one that do not count, since the allocator asked the device for memory.
        num_device_allocations: How often it asked even so, in the call that counts; 0 on a CPU.
    """

    wall_s: float
    cpu_s: float
    num_reruns: int = 0
    num_device_allocations: int = 0


@dataclass(frozen=True, kw_only=True)
class Peak:
    """Of the GPU's memory in one call that began with an empty cache; `None` on a CPU."""

    peak_allocated_bytes: int | None
    peak_reserved_bytes: int | None


def cost_of(call: Callable[[], Any], *, on_gpu: bool, max_reruns: int = MAX_RERUNS) -> Cost:
    """Times `call` with a warm cache, from an idle device until it is idle again. It may run again: what it
    leaves must be the same then."""
    (wall_s, cpu_s), num_reruns, num_allocations = settled(
        lambda: seconds_of(call, on_gpu=on_gpu), on_gpu=on_gpu, max_reruns=max_reruns
    )
    return Cost(wall_s=wall_s, cpu_s=cpu_s, num_reruns=num_reruns, num_device_allocations=num_allocations)


def settled(call: Callable[[], T], *, on_gpu: bool, max_reruns: int = MAX_RERUNS) -> tuple[T, int, int]:
    """What `call` returns, how often it was run again, and how often the allocator asked the device for
    memory in the run that counts. A run in which it asked is not one of a training loop, whose cache has what
    every step needs: it is repeated, `max_reruns` times at most."""
    num_reruns = 0
    while True:
        before = _device_allocations(on_gpu=on_gpu)
        result = call()
        num_allocations = _device_allocations(on_gpu=on_gpu) - before
        if num_allocations == 0 or num_reruns == max_reruns:
            return result, num_reruns, num_allocations
        num_reruns += 1


def _device_allocations(*, on_gpu: bool) -> int:
    if not on_gpu:
        return 0
    stats: dict[str, int] = torch.cuda.memory_stats()
    return stats["num_device_alloc"] + stats["num_alloc_retries"]


def seconds_of(call: Callable[[], Any], *, on_gpu: bool) -> tuple[float, float]:
    """Wall and CPU time of one call, from an idle device until it is idle again."""
    if on_gpu:
        torch.cuda.synchronize()
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    call()
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - wall_s, time.process_time() - cpu_s


def peak_of(call: Callable[[], Any], *, on_gpu: bool) -> Peak:
    """Runs `call` once. On a GPU nothing else holds memory then but what is alive: the cache is emptied."""
    if not on_gpu:
        call()
        return Peak(peak_allocated_bytes=None, peak_reserved_bytes=None)
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return Peak(
        peak_allocated_bytes=torch.cuda.max_memory_allocated(),
        peak_reserved_bytes=torch.cuda.max_memory_reserved(),
    )


def median_s(call: Callable[[], Any], *, on_gpu: bool, num_calls: int = 5) -> float:
    """Median seconds of a call, after one to warm up. On CUDA, by events."""
    call()
    seconds: list[float] = []
    for _ in range(num_calls):
        if on_gpu:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            seconds.append(begin.elapsed_time(end) / 1e3)
        else:
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def matmul_flops(device: str, dtype: torch.dtype, size: int | None = None) -> float:
    """FLOP/s of a large product of random matrices: what utilisation is measured against.

    Args:
        size: Rows and columns; by default 16,384 on CUDA, else 1,024.
    """
    on_gpu = torch.device(device).type == "cuda"
    size = size or (16384 if on_gpu else 1024)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = median_s(lambda: a @ b, on_gpu=on_gpu, num_calls=10 if on_gpu else 5)
    num_flops: int = 2 * size**3
    return num_flops / seconds


def step_flops(model: torch.nn.Module, num_tokens: int) -> dict[str, int]:
    """Model FLOPs of a step: by the convention of `chunkdist.models.flops`, in which frozen weights count
    like
    trained ones, and without the gradients of frozen matrices, which nobody computes."""
    by_convention = StepFlops.of(model).step([num_tokens])
    trained = [name for name, p in model.named_parameters() if p.requires_grad and p.ndim > 1]
    num_trained = sum(model.get_parameter(name).numel() for name in trained)
    num_frozen = max(0, num_active_parameters(model) - num_trained)
    return {"by_convention": by_convention, "needed": by_convention - 2 * num_frozen * num_tokens}


def limit_gpu_memory(memory_gib: float) -> None:
    """Lets this process take so much of the GPU's memory, less 1 GiB for the context and the desktop.

    Raises:
        ValueError: the GPU has less, or that is nothing.
    """
    total = torch.cuda.get_device_properties(0).total_memory
    usable = (memory_gib - 1) * 2**30
    if not 0 < usable <= total:
        raise ValueError(
            f"--memory-gib {memory_gib:g}, but the GPU has {total / 2**30:.1f} GiB: write more than 1 and no "
            "more than it has"
        )
    torch.cuda.set_per_process_memory_fraction(usable / total)
