"""`"auto"` in a `ChunkConfig`: the planner's choice for the memory that is really free, made once, before the
first step, and alike on all ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from torch import distributed, nn

from chunkdist.config import AUTO_FIELDS, ChunkConfig
from chunkdist.memory.cards import CARDS, Card, card_named
from chunkdist.memory.model_sizes import ModelSizes
from chunkdist.memory.planner import (
    Job,
    choose_keep,
    choose_retained,
    gib,
    plan_as_configured,
    plan_step,
)
from chunkdist.memory.sharded import SINGLE, Engine
from chunkdist.models.flops import StepFlops
from chunkdist.models.layers import adds_between_layers
from chunkdist.sharding.fsdp2 import device_of
from chunkdist.stores.free_memory import free_host_bytes

USABLE_SHARE = {"cuda": 0.9, "cpu": 0.5}
"""Share of the free memory that is planned with: the rest is for what the estimate leaves out (a kernel's
scratch space, the allocator's
gaps), on a CPU also for other processes."""

SMALL_SHARE = 0.01
"""What attention's outputs may take of the free memory without an estimate."""


def free_bytes(device: torch.device) -> int:
    """Memory that this process could still take: of the GPU, what its allocator holds unused included; of the
    host, its share. Not free is what other processes have, what a MIG card has not been given, and what
    `torch.cuda.set_per_process_memory_fraction` forbids."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        reserved, allocated = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
        allowed = int(total * torch.cuda.get_per_process_memory_fraction(device))
        return max(0, min(free, allowed - reserved)) + reserved - allocated
    return free_host_bytes()


def resolve_auto(
    model: nn.Module,
    config: ChunkConfig,
    sizes: ModelSizes,
    *,
    num_tokens: int,
    num_rows: int = 1,
    optimizer: str = "",
    engine: Engine = SINGLE,
    num_micro_batches: int = 1,
    available_bytes: int | None = None,
) -> tuple[ChunkConfig, str]:
    """`config` with values in the place of `"auto"`, and why these.

    Weights lie in memory already; gradients and optimizer states count as if they did not yet. With several
    ranks, all must call it unless only `retained_chunks` is asked for: they plan for the least memory and the
    longest row among them, since other groups would be gathered in another order.

    Args:
        sizes: The sizes of `model`.
        num_tokens: Tokens of the longest row that will come.
        available_bytes: What may be used beside the weights; `None`: `USABLE_SHARE` of what is free.

    Raises:
        ValueError: nothing fits; says what would be needed at least.
    """
    device = device_of(model)
    share = USABLE_SHARE.get(device.type, min(USABLE_SHARE.values()))
    if available_bytes is None:
        available_bytes = int(free_bytes(device) * share)
    host_bytes = int(free_host_bytes() * USABLE_SHARE["cpu"])
    asked = [name for name in AUTO_FIELDS if getattr(config, name) == "auto"]
    if config.layers_per_group == "auto" and adds_between_layers(model):
        config = replace(config, layers_per_group=1)
    card = card_of(device)
    if asked != ["retained_chunks"]:
        available_bytes, host_bytes, num_tokens = _alike(device, available_bytes, host_bytes, num_tokens)
        card = _slowest(card)
    weights = Job(
        sizes=sizes,
        flops=StepFlops.of(model),
        card=card,
        available_bytes=available_bytes,
        host_bytes=host_bytes,
        num_rows=num_rows,
        engine=engine,
        optimizer=optimizer,
        num_micro_batches=num_micro_batches,
    )
    job = _with_room_of_weights(weights, config.without_auto(), num_tokens)
    if asked == ["retained_chunks"]:
        chosen = choose_keep(job, replace(config, retained_chunks=0), num_tokens)
        chosen = choose_retained(job, chosen, num_tokens)
    else:
        chosen = plan_step(job, config, num_tokens).config
    estimate = job.estimate(chosen, num_tokens)
    told = [*asked, *(["keep_attention"] if config.keep_attention == "auto" else [])]
    choice = ", ".join(f"{name}={getattr(chosen, name)}" for name in told)
    if asked == ["retained_chunks"]:
        num_chunks = -(-num_tokens // int(chosen.chunk_size))
        choice = f"{chosen.retained_chunks} of the {num_chunks} chunks of {num_tokens:,} tokens"
    return chosen, (
        f"auto: {choice}; a step then needs {gib(estimate.step_bytes)} of {gib(available_bytes)}, "
        f"{share:.0%} of what is free"
    )


def resolve_keep(
    model: nn.Module,
    config: ChunkConfig,
    count: Callable[[], ModelSizes],
    *,
    num_tokens: int,
    num_rows: int = 1,
    optimizer: str = "",
    engine: Engine = SINGLE,
    num_micro_batches: int = 1,
) -> tuple[bool | Literal["global"], str]:
    """Of which layers attention's outputs are kept where nothing else of `config` is left to the planner, and
    why.

    Ranks may differ in it: neither gradients nor collectives depend on it.

    Args:
        count: Counts the sizes of `model`; asked only where outputs are more than `SMALL_SHARE` of what is
            free.
        num_tokens: Tokens of the longest row that is known to come.
    """
    if config.sampler is not None:
        return False, "auto: dropped chunks, not known before the backward, would keep theirs for nothing"
    device = device_of(model)
    share = USABLE_SHARE.get(device.type, min(USABLE_SHARE.values()))
    free, free_host = int(free_bytes(device) * share), int(free_host_bytes() * USABLE_SHARE["cpu"])
    try:
        flops = StepFlops.of(model)
        # 12 FLOPs a pair and unit of the queries' width; at most fp32, and a log-sum-exp for each head.
        most = num_tokens * num_rows * 8 * sum(cost for _, cost in flops.per_pair) // 12
        if 0 < most <= SMALL_SHARE * min(free, free_host):
            return True, f"auto: they take less than {SMALL_SHARE:.0%} of what is free"
        job = Job(
            sizes=count(),
            flops=flops,
            card=card_of(device),
            available_bytes=free,
            host_bytes=free_host,
            num_rows=num_rows,
            engine=engine,
            optimizer=optimizer,
            num_micro_batches=num_micro_batches,
        )
        job = _with_room_of_weights(job, config, num_tokens)
        chosen = choose_keep(job, replace(config, keep_attention="auto"), num_tokens)
        without, kept = (
            plan_as_configured(job, replace(config, keep_attention=keep), num_tokens)
            for keep in (False, chosen.keeps_attention or True)
        )
    except Exception as error:  # what only saves time ends no run
        return False, f"auto: memory cannot be estimated ({type(error).__name__}: {error})"
    saved = f"{1 - kept.time.seconds / without.time.seconds:.0%} of a step by estimate"
    needs = f"a step then needs {gib(kept.estimate.step_bytes)}"
    needs += f" and {gib(kept.estimate.host_bytes)} on the host" if kept.estimate.host_bytes else ""
    room = f"{gib(free)} and {gib(free_host)}, {share:.0%} of what is free"
    if chosen.keeps_attention:
        return chosen.keeps_attention, f"auto: saves {saved}; {needs} of {room}"
    if job.fits(kept.estimate):
        return False, f"auto: would save {saved}: too little"
    return False, f"auto: no room: would save {saved}; {needs} of {room}"


def card_of(device: torch.device) -> Card:
    """What the time is predicted with."""
    if device.type == "cuda":
        return card_named(torch.cuda.get_device_name(device))
    return replace(CARDS["rtx3090"], flops=1e11)  # only the order of schedules matters


def _slowest(card: Card) -> Card:
    """The slowest of all ranks' cards: another one would make another schedule the fastest."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return card
    cards: list[Card] = [card] * distributed.get_world_size()
    distributed.all_gather_object(cards, card)
    return min(cards, key=lambda card: (card.flops, card.name))


def _alike(device: torch.device, available: int, host: int, num_tokens: int) -> tuple[int, int, int]:
    """The least memory and the most tokens of all ranks."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return available, host, num_tokens
    least = torch.tensor([available, host, -num_tokens], dtype=torch.int64, device=device)
    distributed.all_reduce(least, op=distributed.ReduceOp.MIN)
    available, host, longest = least.tolist()
    return available, host, -longest


def _with_room_of_weights(job: Job, config: ChunkConfig, num_tokens: int) -> Job:
    """`job` with the weights counted as available, too: they are on the device, or on the host, and in its
    estimates."""
    estimate = job.estimate(config, num_tokens)
    return replace(
        job,
        available_bytes=job.available_bytes + estimate.device["weights"],
        host_bytes=job.host_bytes + estimate.host.get("weights on the host", 0),
    )
