"""One rank of FSDP2 under fake tensors: torch's own sharding, with collectives that move nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from chunkdist.model_layers import causal_lm_of


@contextmanager
def fake_ranks(num_ranks: int) -> Iterator[DeviceMesh]:
    """A process group whose other ranks are not there.

    Raises:
        ValueError: this process is a rank of a real one.
    """
    if distributed.is_initialized():
        raise ValueError(
            "a process group is running, and FSDP2 is simulated in one of its own: simulate in a process "
            "that is not a rank"
        )
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=num_ranks)
    try:
        yield init_device_mesh("cpu", (num_ranks,))
    finally:
        distributed.destroy_process_group()


def shard_as_accelerate(
    model: nn.Module, layers: list[nn.Module], mesh: DeviceMesh, gathered: torch.dtype | None
) -> None:
    """Units as Accelerate 1.15 makes them (`fsdp2_prepare_model`): each layer, the embedding, the head; one
    for both where they are tied, with the norm.

    Args:
        gathered: The dtype in which weights are gathered and gradients reduced; `None`: as they are.
    """
    policy = MixedPrecisionPolicy(param_dtype=gathered, reduce_dtype=gathered)
    base = causal_lm_of(model)
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    if head.weight is embedding.weight:
        fully_shard([base.get_decoder().norm, embedding, head], mesh=mesh, mp_policy=policy)
    else:
        fully_shard(embedding, mesh=mesh, mp_policy=policy)
        fully_shard(head, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
