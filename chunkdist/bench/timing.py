"""Seconds, bytes and rates, on a CPU and on CUDA."""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
from torch.utils.benchmark import Timer

from chunkdist.models.flops import StepFlops, num_active_parameters

MAX_RERUNS = 1
"""A step that asks the device for memory each time (near the limit, say) is not run for ever."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The time of one call; `cpu_s` is of all threads of the process.

    Args:
        num_reruns: Calls before this one that do not count, since the allocator asked the device for memory.
        num_device_allocations: How often it asked even so, in the call that counts; 0 on a CPU.
    """

    wall_s: float
    cpu_s: float
    num_reruns: int = 0
    num_device_allocations: int = 0


def cost_of(call: Callable[[], Any], *, max_reruns: int = MAX_RERUNS) -> Cost:
    """Times one call, from an idle device until it is idle again. A call in which the allocator asked the
    device for memory is not one of a training loop, whose cache has what every step needs: it is repeated,
    `max_reruns` times at most."""
    num_reruns, num_allocations = -1, 1
    while num_allocations and num_reruns < max_reruns:
        num_reruns += 1
        before = _device_allocations()
        _wait()
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        call()
        _wait()
        wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
        num_allocations = _device_allocations() - before
    return Cost(wall_s=wall_s, cpu_s=cpu_s, num_reruns=num_reruns, num_device_allocations=num_allocations)


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _device_allocations() -> int:
    if not torch.cuda.is_initialized():
        return 0
    stats: dict[str, int] = torch.cuda.memory_stats()
    return stats["num_device_alloc"] + stats["num_alloc_retries"]


def peak_of(call: Callable[[], Any]) -> dict[str, int]:
    """Runs `call` once, and gives the peaks of GPU memory in it. Nothing else holds memory then but what is
    alive: the cache is emptied."""
    if not torch.cuda.is_initialized():
        call()
        return {}
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return {"peak_allocated_bytes": allocated, "peak_reserved_bytes": reserved}


def median_s(call: Callable[[], Any], *, min_run_s: float = 0.2) -> float:
    """The median seconds of a call, which is repeated for at least so long, on all threads of torch."""
    call()  # to warm up
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return float(timer.blocked_autorange(min_run_time=min_run_s).median)


def matmul_flops(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a large product of random matrices: what utilisation is measured against."""
    size = 16384 if torch.device(device).type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    num_flops: int = 2 * size**3
    return num_flops / median_s(lambda: a @ b)


def step_flops(model: torch.nn.Module, num_tokens: int) -> dict[str, int]:
    """Model FLOPs of a step: by the convention of `chunkdist.models.flops`, in which frozen weights count
    like
    trained ones, and without the gradients of frozen matrices, which nobody computes."""
    by_convention = StepFlops.of(model).step([num_tokens])
    trained = [name for name, p in model.named_parameters() if p.requires_grad and p.ndim > 1]
    num_trained = sum(model.get_parameter(name).numel() for name in trained)
    num_frozen = max(0, num_active_parameters(model) - num_trained)
    return {"by_convention": by_convention, "needed": by_convention - 2 * num_frozen * num_tokens}


def ratios(key: str, own: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    """The median of the ratios of each round to the baseline in it, as `key`, and their range. What slows
    down the machine for a while slows down a whole round; the last one may not have ended."""
    found = [time_s / max(base_s, 1e-9) for time_s, base_s in zip(own, base, strict=False)]
    if not found:
        return {}
    return {key: statistics.median(found), f"{key}_lowest": min(found), f"{key}_highest": max(found)}


def times(own: Sequence[Cost], base: Sequence[Cost], *, as_speedup: bool = False) -> dict[str, Any]:
    """What a row says of its rounds: medians, ratios to the baseline (or by what factor it is slower), and
    all of them."""
    found: dict[str, Any] = {"rounds": [asdict(cost) for cost in own]}
    for clock in ("wall", "cpu"):
        own_s, base_s = ([getattr(cost, f"{clock}_s") for cost in costs] for costs in (own, base))
        found[f"median_{clock}_s"] = statistics.median(own_s)
        pair = ("speedup", base_s, own_s) if as_speedup else ("ratio", own_s, base_s)
        found |= ratios(f"{clock}_{pair[0]}", *pair[1:])
    return found


def rotated(items: Sequence[T], number: int) -> list[T]:
    """The order of round `number`, counted from 0."""
    shift = number % max(1, len(items))
    return [*items[shift:], *items[:shift]]


def largest(figures: Iterable[float]) -> float:
    """The largest of some figures; NaN if any is: Python's `max` passes over one that is not the first."""
    return float(torch.tensor(list(figures), dtype=torch.float64).max())


def report_progress(line: str) -> None:
    """Says on stderr what runs now."""
    print(line, file=sys.stderr, flush=True)
