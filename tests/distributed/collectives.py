"""The collectives of steps of a tiny model, counted at the process group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import distributed
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from chunkdist import chunk_model
from chunkdist.sharding.collectives import CollectiveCounter, Traffic
from tests.distributed.cases import Case, build, chunk_config, deepspeed_engine, micro_batches, shard_fsdp2

NUM_WARM_UPS = 2


def counts_of(case: Case) -> dict[str, Traffic]:
    """The collectives of this rank's third step: DeepSpeed records its trace in the first, and ranks agree on
    it in the second."""
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
        engine = deepspeed_engine(model, case)

        def engine_step() -> None:
            engine.backward(engine(**inputs).loss)
            engine.step()

        counts = _counted(engine_step)
        engine.destroy()
        return counts
    shard_fsdp2(model, case)

    def step() -> None:
        model(**inputs).loss.backward()
        model.zero_grad()

    return _counted(step)


def _counted(step: Callable[[], None]) -> dict[str, Traffic]:
    for _ in range(NUM_WARM_UPS):
        step()
    with CollectiveCounter() as counter:
        step()
    return counter.by_kind


def counts_by_hand() -> dict[str, tuple[int, int, int]]:
    """What is counted of known collectives: their number, bytes, and bytes sent by a rank."""

    class Gather(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            distributed.all_gather([torch.empty(4), torch.empty(4)], grad)
            return grad

    x = torch.ones(4, requires_grad=True)
    with CollectiveCounter() as counter:
        distributed.all_gather_into_tensor(torch.empty(8), torch.ones(4))
        Gather.apply(x).sum().backward()
        distributed.reduce_scatter_tensor(torch.empty(2), torch.ones(4))
        distributed.all_reduce(torch.ones(3))
        distributed.broadcast(torch.ones(2), src=0)
    distributed.all_reduce(torch.ones(5))  # outside: not counted
    return {kind: (x.count, x.whole_bytes, x.sent_bytes) for kind, x in counter.by_kind.items()}
