"""Chooses a schedule: of those that fit into memory, the one with the least predicted time.

Tried are chunk sizes and heights of groups in powers of two, K/V kept and rebuilt, attention's outputs kept
or not, host offload, and as many retained chunks as there is room for; what a config sets, stays. Everything
is arithmetic on `ModelSizes`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

from chunkdist.config import ChunkConfig
from chunkdist.memory.cards import Card
from chunkdist.memory.estimate import MemoryEstimate, estimate_memory
from chunkdist.memory.model_sizes import ModelSizes
from chunkdist.memory.optimizers import OptimizerMemory
from chunkdist.memory.row_parts import config_of_part, sizes_of_part
from chunkdist.memory.sharded import SINGLE, Engine
from chunkdist.memory.step_time import StepTime, step_time
from chunkdist.models.flops import StepFlops

CHUNK_SIZES = (512, 1024, 2048, 4096, 8192, 16384)
"""Tokens of a rank. Below 512 a GPU idles between kernels."""
HEIGHTS = (1, 2, 4)
"""Beside all layers. Of groups in between, graphs and K/V gradients are more than inputs are less."""
EQUAL = 1.02
"""Predicted times are not more exact than this: of schedules within it, the one with the least host memory,
then the least device memory, is taken."""
LENGTH_STEP = 1024
"""In which the longest length is sought."""
LONGEST = 2**24
CONTEXT_BYTES, MARGIN_SHARE = 2**30, 0.03
"""What a card has not for us (CUDA's context, loaded kernels, cuBLAS's workspaces: 8 MiB for each thread, 32
on Hopper), and what is not planned with of the rest (gaps, kernels' scratch space, under deterministic
algorithms the copies of dq)."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is planned for.

    Args:
        engine: The estimate is that of one of its ranks.
        optimizer, num_micro_batches: As in `estimate_memory`.
        sequence_ranks: Ranks that share the tokens of each row.
        available_bytes: On the device, for weights and all else.
        host_bytes: On the host, for this rank.
    """

    sizes: ModelSizes
    flops: StepFlops
    card: Card
    available_bytes: int
    host_bytes: int
    num_rows: int = 1
    engine: Engine = SINGLE
    optimizer: str = ""
    num_micro_batches: int = 1
    sequence_ranks: int = 1

    @property
    def sizes_of_part(self) -> ModelSizes:
        """Sizes by token of one rank's part of the rows."""
        return sizes_of_part(self.sizes, self.sequence_ranks)

    def estimate(self, config: ChunkConfig, num_tokens: int) -> MemoryEstimate:
        """The memory of one rank, for rows of `num_tokens` on all ranks that share them."""
        return estimate_memory(
            self.sizes_of_part,
            config_of_part(config, self.sequence_ranks),
            num_tokens=-(-num_tokens // self.sequence_ranks),
            num_rows=self.num_rows,
            engine=self.engine,
            optimizer=self.optimizer,
            num_micro_batches=self.num_micro_batches,
        )

    def fits(self, estimate: MemoryEstimate) -> bool:
        return estimate.peak_bytes <= self.available_bytes and estimate.host_bytes <= self.host_bytes


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A schedule, what it needs, and how long a step is expected to take."""

    config: ChunkConfig
    estimate: MemoryEstimate
    time: StepTime


class NothingFits(ValueError):
    """No schedule fits. `nearest` is the one with the least memory."""

    def __init__(self, message: str, nearest: Plan) -> None:
        super().__init__(message)
        self.nearest = nearest


def plan_step(job: Job, config: ChunkConfig, num_tokens: int) -> Plan:
    """The schedule for rows of `num_tokens`, with a value in the place of each `"auto"` of `config`.

    Raises:
        NothingFits: none has room.
    """
    plans = [_plan(job, candidate, num_tokens) for candidate in _candidates(job, config, num_tokens)]
    fitting = [plan for plan in plans if job.fits(plan.estimate)]
    if not fitting:
        nearest = min(plans, key=lambda plan: plan.estimate.peak_bytes)
        raise NothingFits(
            f"{num_tokens:,} tokens need {gib(nearest.estimate.peak_bytes)} on the device and "
            f"{gib(nearest.estimate.host_bytes)} on the host at least, of {gib(job.available_bytes)} and "
            f"{gib(job.host_bytes)}: write a smaller max_length, load_in_4bit: true, or more ranks that "
            "share the weights",
            nearest,
        )
    if config.retained_chunks == "auto":
        fitting += [_retaining(job, plan, config, num_tokens) for plan in fitting]
    fastest = min(plan.time.seconds for plan in fitting)
    equal = [plan for plan in fitting if plan.time.seconds <= EQUAL * fastest]
    return min(equal, key=lambda plan: (plan.estimate.host_bytes, plan.estimate.peak_bytes))


def plan_as_configured(job: Job, config: ChunkConfig, num_tokens: int) -> Plan:
    """The plan of a schedule without `"auto"` but for `keep_attention`, whether it fits or not."""
    return _plan(job, choose_keep(job, config, num_tokens), num_tokens)


def longest_length(job: Job, config: ChunkConfig) -> int:
    """The most tokens of a row for which a schedule fits, in steps of `LENGTH_STEP`; 0: none does."""
    lean = replace(config, retained_chunks=0) if config.retained_chunks == "auto" else config
    lean = replace(lean, keep_attention=False) if config.keep_attention == "auto" else lean

    def fits(length: int) -> bool:
        candidates = _candidates(job, lean, length)
        return any(job.fits(job.estimate(candidate, length)) for candidate in candidates)

    return most(fits, LONGEST // LENGTH_STEP, unit=LENGTH_STEP)


def choose_keep(job: Job, config: ChunkConfig, num_tokens: int) -> ChunkConfig:
    """`config` with a value in the place of `keep_attention="auto"`: attention's outputs are kept, of the
    fewest layers, where there is room for them and a step is predicted to be faster by more than `EQUAL`."""
    if config.keep_attention != "auto":
        return config
    plans = [_plan(job, replace(config, keep_attention=keep), num_tokens) for keep in _keeps(job, config)]
    fitting = [plan for plan in plans if plan.config.keeps_attention is False or job.fits(plan.estimate)]
    fastest = min(plan.time.seconds for plan in fitting)
    return next(plan.config for plan in fitting if plan.time.seconds <= EQUAL * fastest)


def choose_retained(job: Job, config: ChunkConfig, num_tokens: int) -> ChunkConfig:
    """`config` with as many retained chunks as there is room for."""

    def fits(count: int) -> bool:
        return job.fits(job.estimate(replace(config, retained_chunks=count), num_tokens))

    num_chunks = -(-num_tokens // int(config.chunk_size))
    return replace(config, retained_chunks=most(fits, num_chunks))


def most(fits: Callable[[int], bool], limit: int, unit: int = 1) -> int:
    """The largest multiple of `unit` up to `limit` units that fits, by bisection; 0 if none does."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle * unit):
            low = middle
        else:
            high = middle - 1
    return low * unit


def usable_bytes(memory_bytes: int) -> int:
    """What may be planned with of a whole card: less what CUDA and a desktop take, and a margin for the
    allocator's gaps and kernels'
    scratch space."""
    return int((memory_bytes - CONTEXT_BYTES) * (1 - MARGIN_SHARE))


def gib(num_bytes: float) -> str:
    """For people to read."""
    return f"{num_bytes / 2**30:.2f} GiB"


def _plan(job: Job, config: ChunkConfig, num_tokens: int) -> Plan:
    estimate = job.estimate(config, num_tokens)
    time = step_time(
        job.sizes_of_part,
        job.flops,
        config,
        job.card,
        num_tokens=num_tokens,
        num_rows=job.num_rows,
        engine=job.engine,
        host_bytes=estimate.waiting_bytes,
        traffic=job.engine.traffic(job.sizes, OptimizerMemory.named(job.optimizer)),
        num_micro_batches=job.num_micro_batches,
        sequence_ranks=job.sequence_ranks,
    )
    return Plan(config=config, estimate=estimate, time=time)


def _retaining(job: Job, plan: Plan, asked: ChunkConfig, num_tokens: int) -> Plan:
    """`plan` with as many retained chunks as fit."""
    config = replace(plan.config, rebuild_kv=asked.rebuild_kv if asked.rebuild_kv is not True else "auto")
    chosen = choose_retained(job, config, num_tokens)
    return _plan(job, chosen, num_tokens) if chosen.retained_chunks else plan


def _keeps(job: Job, config: ChunkConfig) -> list[bool | Literal["global"]]:
    """What `keep_attention` may be, least memory first."""
    if config.keep_attention != "auto":
        return [config.keep_attention]
    if config.sampler is not None:
        return [False]  # which chunks are dropped is known in the backward: theirs would wait for nothing
    windowed = {cell.window is not None for cell in job.sizes.cells if cell.attention_bytes}
    return [False, "global", True] if len(windowed) == 2 else [False, True]


def _candidates(job: Job, config: ChunkConfig, num_tokens: int) -> Iterator[ChunkConfig]:
    """All schedules that keep what `config` sets, without retained chunks where these are to be chosen."""
    num_layers = len(job.sizes.cells)
    chunk_sizes: list[int] = [int(config.chunk_size)] if config.chunk_size != "auto" else []
    if not chunk_sizes:
        every = [size * job.sequence_ranks for size in CHUNK_SIZES]
        chunk_sizes = [size for size in every if size < 2 * num_tokens] or every[:1]
    heights: list[Any] = [config.layers_per_group]
    if config.layers_per_group == "auto":
        some = [height for height in HEIGHTS if height < num_layers]
        heights = [1] if job.engine.name == "zero3" else [*some, "all"]
    offloads: list[Literal["none", "host"]] = (
        ["none", "host"] if config.offload == "auto" else [config.offload]
    )
    retained = 0 if config.retained_chunks == "auto" else config.retained_chunks
    rebuilds = [config.rebuild_kv]
    if config.rebuild_kv == "auto" and config.layers_per_group == "auto":
        rebuilds = [False] if retained else [True, False]
    for chunk_size, height, rebuild, offload, keep in product(
        chunk_sizes, heights, rebuilds, offloads, _keeps(job, config)
    ):
        yield replace(
            config,
            chunk_size=chunk_size,
            layers_per_group=height,
            rebuild_kv=rebuild,
            offload=offload,
            keep_attention=keep,
            retained_chunks=retained,
        )
