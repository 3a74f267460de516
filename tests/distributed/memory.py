"""What a rank holds: the bytes of its live storages, in real steps of small models in fp32 with AdamW."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import distributed, nn

from chunkdist import ChunkConfig, chunk_model
from chunkdist.bench.sharding import RELEASED
from chunkdist.memory import LiveBytes
from chunkdist.memory.estimate import estimate_memory
from chunkdist.memory.model_sizes import ModelSizes
from chunkdist.memory.sharded import Engine
from tests.distributed.cases import OFFLOADED, Case, shard_fsdp2
from tests.helpers.models import batch, tiny_llama, with_lora

CHUNK_SIZE = 64


@dataclass(frozen=True, kw_only=True)
class Held:
    """Bytes: between steps; what a backward leaves beside that; at the peak of a step for each sequence."""

    between_steps: int
    after_backward: int
    peaks: tuple[int, ...]


def model_for_memory() -> nn.Module:
    return tiny_llama(dtype=torch.float32)


def held_by(engine: str, lengths: tuple[int, ...]) -> Held:
    """Runs on every rank; `none` is the chunked model without any engine."""
    with LiveBytes() as live:
        model: nn.Module = chunk_model(
            model_for_memory(), ChunkConfig(chunk_size=CHUNK_SIZE, attention="math")
        )
        if engine == "zero3":
            step = _zero3_step(model)
        else:
            if engine == "fsdp2":
                shard_fsdp2(model, Case(engine="fsdp2"))
            step = _plain_step(model)
        del model
        peaks = []
        between_steps = after_backward = 0
        for _ in range(2):  # the first makes the optimizer's states; DeepSpeed records its trace in two
            step(CHUNK_SIZE, live)
        for length in lengths:
            between_steps = live.current_bytes
            live.reset_peak()
            after_backward = step(length, live) - between_steps
            peaks.append(live.peak_bytes)
    return Held(between_steps=between_steps, after_backward=after_backward, peaks=tuple(peaks))


def formula_and_count_of_zero3(lora: bool, released: bool, offloads: bool) -> list[tuple[int, int]]:
    """By formula and counted: the peak on the device, of weights, states and a step; and what is on the host,
    if it is offloaded. Runs on every rank, where both memories are the CPU's."""
    num_tokens, hidden = 768, 256
    model: nn.Module = tiny_llama(dtype=torch.float32, hidden_size=hidden, intermediate_size=3 * hidden)
    model = with_lora(model) if lora else model  # type: ignore[arg-type]
    config = ChunkConfig(chunk_size=128, keep_attention=False)
    sizes = ModelSizes.for_config(chunk_model(model, config), config)
    engine = Engine(
        name="zero3",
        num_ranks=distributed.get_world_size(),
        max_live_numbers=0 if released else 10**9,
        offloads_weights=offloads,
        offloads_optimizer=offloads,
    )
    optimizer = "adamw_torch_fused"
    estimate = estimate_memory(sizes, config, num_tokens=num_tokens, engine=engine, optimizer=optimizer)
    settings: dict[str, Any] = {**(RELEASED if released else _as_transformers(hidden))}
    peak = between_steps = 0
    with LiveBytes() as live, CopiesToTheDevice():
        step = _zero3_step(model, settings | (OFFLOADED if offloads else {}))
        del model
        for _ in range(3):
            between_steps = live.current_bytes
            live.reset_peak()
            step(num_tokens, live)
            peak = live.peak_bytes
    if not offloads:
        return [(estimate.peak_bytes, peak)]
    of_step = estimate.peak_bytes - estimate.device["collectives"]  # a bucket is there all the time
    return [(of_step, peak - between_steps), (estimate.host_bytes, between_steps)]


class CopiesToTheDevice:
    """Inside, what an engine moves to the device asynchronously is a copy, though it is on a CPU already.

    `num_bytes` counts them.
    """

    def __enter__(self) -> CopiesToTheDevice:
        self.num_bytes, real = 0, torch.Tensor.to

        def to(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            result = real(tensor, *args, **kwargs)
            if not kwargs.get("non_blocking"):
                return result
            self.num_bytes += result.nbytes
            return result.clone() if result is tensor else result

        torch.Tensor.to = to  # type: ignore[method-assign, assignment]
        return self

    def __exit__(self, *args: Any) -> None:
        del torch.Tensor.to  # its base class has the real one


def bytes_over_the_bus(engine: str, lora: bool) -> tuple[int, int]:
    """What one step copies in, counted and by formula. Runs on every rank."""
    case = Case(engine="zero3" if engine == "zero3" else "fsdp2 head", weights_on_host=True)
    model: nn.Module = tiny_llama(dtype=torch.float32)
    model = with_lora(model) if lora else model  # type: ignore[arg-type]
    config = ChunkConfig(chunk_size=CHUNK_SIZE, keep_attention=False)
    sizes = ModelSizes.for_config(chunk_model(model, config), config)
    on_host = {"offloads_weights": True, "offloads_optimizer": True}
    known: Any = {"name": engine, "num_ranks": distributed.get_world_size(), **on_host}
    expected = Engine(**known).traffic(sizes, None)
    if engine == "zero3":
        step = _zero3_step(model, {**RELEASED, **OFFLOADED})
    else:
        shard_fsdp2(model, replace(case, lora=lora))
        step = _plain_step(model)
    for _ in range(3):
        with CopiesToTheDevice() as copies, LiveBytes() as live:
            step(2 * CHUNK_SIZE, live)
    return copies.num_bytes, expected.into


def _as_transformers(hidden: int) -> dict[str, int]:
    """What it puts for `"auto"` (integrations/deepspeed.py), as in configs/deepspeed/zero3.json."""
    return {
        "reduce_bucket_size": hidden**2,
        "stage3_prefetch_bucket_size": int(0.9 * hidden**2),
        "stage3_param_persistence_threshold": 10 * hidden,
    }


def _plain_step(model: nn.Module):  # type: ignore[no-untyped-def]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)

    def step(length: int, live: LiveBytes) -> int:
        model(**batch(num_tokens=length), use_cache=False).loss.backward()
        after_backward = live.current_bytes
        optimizer.step()
        optimizer.zero_grad()
        return after_backward

    return step


def _zero3_step(model: nn.Module, settings: dict[str, Any] = RELEASED):  # type: ignore[no-untyped-def]
    import deepspeed

    from chunkdist.train.launch.ranks import skip_shm_build

    skip_shm_build()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "reduce_bucket_size": 1000, "sub_group_size": 10**6, **settings},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, foreach=False)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

    def step(length: int, live: LiveBytes) -> int:
        engine.backward(engine(**batch(num_tokens=length), use_cache=False).loss)
        after_backward = live.current_bytes
        engine.step()
        return after_backward

    return step
