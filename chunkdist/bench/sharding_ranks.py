"""What each rank of the sharding benchmark runs: steps under an engine, whose collectives it counts."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from chunkdist import ChunkConfig, chunk_model
from chunkdist.bench.options import dtype_on
from chunkdist.bench.sizes import Sizes
from chunkdist.loss.lazy_logits import lazy_logits
from chunkdist.sharding.collectives import CollectiveCounter

GROUP = 2
GROUP_UNITS = f"FSDP2, units of {GROUP} layers"
"""In it, so many layers are a unit, and a group."""

NUM_WARM_UPS = 2
"""Steps that are not counted: DDP forms its buckets anew after the first, ZeRO-3 records its trace in it."""

RELEASED = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}
"""ZeRO-3 settings with which no weight stays whole between the layer that uses it and the next."""


Step = Callable[[Tensor], None]
"""Forward and backward, from ids (1, T), and what the engine's step has to do; gradients do not stay."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A step of one engine.

    Args:
        engine: Of `ENGINES`.
        way: Its name.
        chunk_size: Tokens; `None`: the plain model.
        lora: Only adapters are trained.
        leaves: Of the plain model under ZeRO-3: layers are leaf modules, as `chunk_model` makes them.
    """

    engine: str
    way: str
    chunk_size: int | None
    lora: bool
    leaves: bool = False


def run_cases(
    rank: int,
    cases: list[Case],
    sizes: Sizes,
    lengths: list[int],
    *,
    device_type: str,
    folder: Path,
) -> None:
    """Runs every case on one rank, and writes its counts to `folder`, as `{rank}.json`, after each.

    Args:
        lengths: Tokens of each rank's sequence.
        folder: Of this machine, empty: the ranks meet there.
    """
    num_ranks = len(lengths)
    os.environ.update(LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE=str(num_ranks))  # DeepSpeed reads them
    device = torch.device("cpu")
    if device_type == "cuda":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    else:
        os.environ["DS_ACCELERATOR"] = "cpu"
        torch.set_num_threads(1)
    backend = "nccl" if device_type == "cuda" else "gloo"
    distributed.init_process_group(
        backend,
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=num_ranks,
        timeout=timedelta(minutes=2),
    )
    try:
        found = []
        for case in cases:
            if rank == 0:
                print(f"{case.engine}, {case.way}", file=sys.stderr, flush=True)
            found.append(counts_of(case, sizes, lengths[rank], device))
            write_counts(found, rank, folder)
    finally:
        distributed.destroy_process_group()


def write_counts(found: list[dict[str, dict[str, int]]], rank: int, folder: Path) -> None:
    """Of all cases so far. Who reads meanwhile finds the ones before."""
    part = folder / f"{rank}.part"
    part.write_text(json.dumps(found), encoding="utf-8")
    part.replace(folder / f"{rank}.json")


def counts_of(case: Case, sizes: Sizes, num_tokens: int, device: torch.device) -> dict[str, dict[str, int]]:
    """The collectives of one step of this rank, by kind: its traffic."""
    sizes = replace(sizes, lora_rank=8 if case.lora else 0)
    ids = replace(sizes, num_tokens=num_tokens).tokens(str(device))
    model = sizes.model(str(device), dtype_on(device.type))
    causal_lm = model.get_base_model() if case.lora else model
    if case.chunk_size is not None:
        height = GROUP if case.engine == GROUP_UNITS else 1
        chunk_model(model, ChunkConfig(chunk_size=case.chunk_size, layers_per_group=height))
    with ExitStack() as stack:
        if case.chunk_size is None:  # a chunked model has the tiled loss by itself
            stack.enter_context(lazy_logits(causal_lm))
        step = stack.enter_context(ENGINES[case.engine](case, model, causal_lm))
        for _ in range(NUM_WARM_UPS):
            step(ids)
        with CollectiveCounter() as counter:
            step(ids)
    return {kind: asdict(traffic) for kind, traffic in counter.by_kind.items()}


@contextmanager
def _ddp(case: Case, model: Any, causal_lm: Any) -> Iterator[Step]:
    ddp = nn.parallel.DistributedDataParallel(model)
    yield lambda ids: _forward_and_backward(ddp, ids)


@contextmanager
def _fsdp2(case: Case, model: Any, causal_lm: Any) -> Iterator[Step]:
    mesh = init_device_mesh(causal_lm.device.type, (distributed.get_world_size(),))
    layers = causal_lm.get_decoder().layers
    height = GROUP if case.engine == GROUP_UNITS else 1
    for start in range(0, len(layers), height):
        unit = list(layers[start : start + height])
        fully_shard(unit if height > 1 else unit[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    yield lambda ids: _forward_and_backward(model, ids)


@contextmanager
def _zero(case: Case, model: Any, causal_lm: Any) -> Iterator[Step]:
    import deepspeed
    from deepspeed.utils import set_z3_leaf_module

    from chunkdist.train.ranks import skip_shm_build

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # it writes to stdout, where the table goes
    skip_shm_build()
    is_zero3 = case.engine == "ZeRO-3"
    if case.leaves:
        for layer in causal_lm.get_decoder().layers:
            set_z3_leaf_module(layer, True)
        if case.lora:  # a leaf reduces in a full backward hook, which wants an input that requires grad
            causal_lm.enable_input_require_grads()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": next(model.parameters()).dtype == torch.bfloat16},
        "zero_optimization": {"stage": 3 if is_zero3 else 2, **(RELEASED if is_zero3 else {})},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

    def step(ids: Tensor) -> None:
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()

    try:
        yield step
    finally:
        engine.destroy()


def _forward_and_backward(model: nn.Module, ids: Tensor) -> None:
    model(input_ids=ids, labels=ids).loss.backward()
    model.zero_grad(set_to_none=True)


ENGINES: dict[str, Callable[[Case, Any, Any], AbstractContextManager[Step]]] = {
    "DDP": _ddp,
    "FSDP2": _fsdp2,
    GROUP_UNITS: _fsdp2,
    "ZeRO-2": _zero,
    "ZeRO-3": _zero,
}
