"""Counts the collectives of a step, by wrapping what FSDP2 and DeepSpeed call (`CommDebugMode` breaks)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from chunkdist import chunk_model
from tests.distributed.cases import Case, build, chunk_config, deepspeed_engine, micro_batches, shard_fsdp2

OF_DEEPSPEED = (
    "all_gather_into_tensor",
    "reduce_scatter_tensor",
    "all_gather",
    "reduce_scatter",
    "all_gather_coalesced",
)
OF_FSDP2 = ("foreach_all_gather", "foreach_reduce")
NUM_STEPS = 3


def counts_of(case: Case) -> list[dict[str, int]]:
    """The collectives of this rank's steps but the first, in which DeepSpeed records its trace."""
    model = build(case, torch.float32)
    if case.chunked:
        chunk_model(model, chunk_config(case))
    elif case.engine == "zero3":
        from deepspeed.utils import set_z3_leaf_module

        layers = [layer for layer in model.modules() if isinstance(layer, LlamaDecoderLayer)]
        for layer in layers:
            set_z3_leaf_module(layer, True)
        layers[0].register_forward_pre_hook(  # a leaf layer needs it, and a frozen embedding does not give it
            lambda layer, inputs: (inputs[0].detach().requires_grad_(), *inputs[1:]) if case.lora else None
        )
    (inputs,) = micro_batches(case, distributed.get_rank())
    if case.engine == "zero3":
        from deepspeed.comm.torch import TorchBackend

        engine = deepspeed_engine(model, case)
        steps = []
        for _ in range(NUM_STEPS):
            with counted(TorchBackend, OF_DEEPSPEED) as counts:
                engine.backward(engine(**inputs).loss)
                engine.step()
            steps.append(dict(counts))
        engine.destroy()
        return steps[1:]
    shard_fsdp2(model, case)
    steps = []
    for _ in range(NUM_STEPS):
        with counted(_fsdp_param_group, OF_FSDP2) as counts:
            model(**inputs).loss.backward()
        steps.append(dict(counts))
        model.zero_grad()
    return steps[1:]


@contextmanager
def counted(owner: Any, names: tuple[str, ...]) -> Iterator[Counter[str]]:
    counts: Counter[str] = Counter()
    real = {name: getattr(owner, name) for name in names if hasattr(owner, name)}

    def wrap(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return real[name](*args, **kwargs)

        return call

    for name in real:
        setattr(owner, name, wrap(name))
    try:
        yield counts
    finally:
        for name, function in real.items():
            setattr(owner, name, function)
