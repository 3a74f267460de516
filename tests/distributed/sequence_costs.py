"""What ranks that share rows send, hold and wait for, counted on every rank of a group."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed
from torch.distributed.fsdp import fully_shard

from chunkdist import ChunkConfig, chunk_model
from chunkdist.memory import LiveBytes
from chunkdist.memory.estimate import estimate_memory
from chunkdist.memory.model_sizes import ModelSizes
from chunkdist.memory.row_parts import config_of_part, exchanged_bytes, sizes_of_part
from chunkdist.sharding.collectives import CollectiveCounter, Traffic
from tests.distributed.cases import sequence_group
from tests.distributed.sequences import part_of
from tests.helpers.models import batch, gradients, tiny_llama, with_lora

NUM_TOKENS = 128
ALL_TO_ALL = "alltoall_base_"


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Of one step of FSDP2, by kind of collective; and what the formula says of the all-to-alls."""

    by_kind: dict[str, Traffic]
    predicted_bytes: float


def traffic(chunk_size: int, shared: bool, rebuild_kv: bool) -> Costs:
    model = tiny_llama(dtype=torch.float32, num_layers=2)
    config = ChunkConfig(chunk_size=chunk_size, rebuild_kv=rebuild_kv, attention="math")
    sizes = sizes_of_part(ModelSizes.for_config(model, config), distributed.get_world_size())
    chunk_model(model, config, sequence_group=distributed.group.WORLD if shared else None)
    for layer in model.model.layers:  # type: ignore[union-attr]
        fully_shard(layer)
    fully_shard(model)
    inputs = batch(num_tokens=NUM_TOKENS)
    with CollectiveCounter() as counter:
        gradients(model, part_of(inputs) if shared else inputs)
    own = NUM_TOKENS // distributed.get_world_size()
    return Costs(by_kind=counter.by_kind, predicted_bytes=exchanged_bytes(sizes, config, own, again=1.0))


def peaks(num_tokens: int, settings: dict[str, Any]) -> tuple[int, int, int]:
    """Bytes over the weights at the peak of a step: of one rank alone, of one that shares, and by formula."""
    found = []
    for group in (None, distributed.group.WORLD):
        config = ChunkConfig(chunk_size=512, **settings)
        model = with_lora(
            tiny_llama(dtype=torch.float32, num_layers=4, hidden_size=64, intermediate_size=192)
        )
        sizes = ModelSizes.for_config(model, config)
        chunk_model(model, config, sequence_group=group)
        inputs = batch(num_tokens=num_tokens)
        inputs = part_of(inputs) if group is not None else inputs
        gradients(model, {name: x[:, :512] for name, x in inputs.items()})  # what is made once
        counted = []
        for _ in range(3):  # gloo's threads sometimes hold what has been sent a moment longer
            model.zero_grad(set_to_none=True)
            with LiveBytes() as live:
                model(**inputs, use_cache=False).loss.backward()
            counted.append(live.peak_bytes)
        found.append(min(counted))
    size = distributed.get_world_size()
    estimate = estimate_memory(
        sizes_of_part(sizes, size), config_of_part(config, size), num_tokens=num_tokens // size
    )
    return found[0], found[1], estimate.step_bytes


def draws(num: int) -> int:
    """Steps of random lengths, chunks, groups and accumulation, other ones in each sequence group."""
    group, size = sequence_group(2), 2
    replica = distributed.get_rank() // size
    model = tiny_llama(dtype=torch.float32, num_layers=2, hidden_size=16, intermediate_size=16)
    chunk_model(model, ChunkConfig(chunk_size=4, attention="math"), sequence_group=group)
    ddp = torch.nn.parallel.DistributedDataParallel(model)
    everywhere, own = random.Random(0), random.Random(replica)
    done = 0
    while done < num:
        num_micro_batches = everywhere.randint(1, 3)
        for number in range(num_micro_batches):
            num_own = own.randint(1, 12)
            inputs = batch(num_tokens=num_own * size, num_rows=own.randint(1, 2), seed=done)
            start = group.rank() * num_own
            part = {name: x[:, start : start + num_own] for name, x in inputs.items()}
            ddp.require_backward_grad_sync = number == num_micro_batches - 1
            ddp(**part, use_cache=False).loss.backward()
            done += 1
        model.zero_grad()
    return done
