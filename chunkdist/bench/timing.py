"""Seconds, bytes and rates, on a CPU and on CUDA."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from chunkdist.flops import StepFlops, num_active_parameters


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one call. `cpu_s` is of all threads of the process; memory is the GPU's, `None` on a CPU."""

    wall_s: float
    cpu_s: float
    peak_allocated_bytes: int | None
    peak_reserved_bytes: int | None


def cost_of(call: Callable[[], Any], *, on_gpu: bool) -> Cost:
    """Runs `call` once, from an idle device with an empty cache until the device is idle again."""
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    call()
    if on_gpu:
        torch.cuda.synchronize()
    return Cost(
        wall_s=time.perf_counter() - wall_s,
        cpu_s=time.process_time() - cpu_s,
        peak_allocated_bytes=torch.cuda.max_memory_allocated() if on_gpu else None,
        peak_reserved_bytes=torch.cuda.max_memory_reserved() if on_gpu else None,
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
    """Model FLOPs of a step: by the convention of `chunkdist.flops`, in which frozen weights count like
    trained ones, and without the gradients of frozen matrices, which nobody computes."""
    by_convention = StepFlops.of(model).step([num_tokens])
    trained = [name for name, p in model.named_parameters() if p.requires_grad and p.ndim > 1]
    num_trained = sum(model.get_parameter(name).numel() for name in trained)
    num_frozen = max(0, num_active_parameters(model) - num_trained)
    return {"by_convention": by_convention, "needed": by_convention - 2 * num_frozen * num_tokens}


def limit_gpu_memory(memory_gib: float | None) -> None:
    """Lets this process take so much of the GPU's memory, less 1 GiB for the context and the desktop.

    Raises:
        ValueError: the GPU has less, or that is nothing.
    """
    if memory_gib is None:
        return
    total = torch.cuda.get_device_properties(0).total_memory
    usable = (memory_gib - 1) * 2**30
    if not 0 < usable <= total:
        raise ValueError(
            f"--memory-gib {memory_gib:g}, but the GPU has {total / 2**30:.1f} GiB: write more than 1 and no "
            "more than it has"
        )
    torch.cuda.set_per_process_memory_fraction(usable / total)
