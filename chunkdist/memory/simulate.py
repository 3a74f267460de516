"""The peak of a step of the real code, on a machine without a GPU: fake tensors, live bytes counted op by op.

Where layers are alike, one group of them is run: what each other group adds is its input, and its K/V and
attention's outputs where they are kept (none of which stays on the device with `offload="host"`).
`check_groups` counts whether that holds. Models whose layers differ, steps with retained chunks, and ranks of
FSDP2 are run whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import _disable_current_modes

from chunkdist.config import ChunkConfig
from chunkdist.engine.chunked_model import ChunkedModel
from chunkdist.memory.cell_sizes import GpuAttention
from chunkdist.memory.fake_model import layer_kinds, loss_of, twin_of, without_triton_kernels
from chunkdist.memory.live_bytes import LiveBytes
from chunkdist.memory.model_sizes import ModelSizes
from chunkdist.memory.sharded import SINGLE, Engine
from chunkdist.models.layers import causal_lm_of, find_layers
from chunkdist.replay import undisturbed_rng

_GROUPS_RUN = 1
"""Its input needs a gradient, as that of a group with others below it."""


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """Bytes over the weights.

    Args:
        peak_bytes: Peak of the device, all layers.
        host_bytes: Bytes on the host, of the layers that were run.
        num_layers_run: How many were run.
    """

    peak_bytes: int
    host_bytes: int
    num_layers_run: int


def simulate(
    model: nn.Module,
    sizes: ModelSizes,
    config: ChunkConfig,
    *,
    num_tokens: int,
    num_rows: int = 1,
    autocast: torch.dtype | None = None,
    groups_run: int = _GROUPS_RUN,
    engine: Engine = SINGLE,
) -> Simulated:
    """The largest sum of live tensors in a forward and backward, as flash attention on a GPU has them.

    Args:
        model: Chunked or not; its weights may be nowhere. Experts are not simulated as they are.
        sizes: The sizes of `model`.
        config: Without `"auto"`.
        autocast: The dtype of the run's autocast; under FSDP2, in which weights are gathered.
        engine: Single, or FSDP2, one rank of which is run.

    Raises:
        ValueError: another engine.
    """
    if engine.name not in ("single", "fsdp2"):
        raise ValueError(f"{engine.name} does not run under fake tensors: simulate single, or fsdp2")
    base = causal_lm_of(model)
    num_layers = len(sizes.cells)
    height = num_layers if config.layers_per_group == "all" else int(config.layers_per_group)
    alike = len(set(layer_kinds(base))) == 1 and not num_layers % height and not config.retained_chunks
    alike = alike and engine.name == "single"
    run = min(num_layers, groups_run * height) if alike else num_layers
    peak, host = _run(model, run, config, num_tokens, num_rows, autocast, engine)
    missing = (num_layers - run) // height
    tokens = num_tokens * num_rows
    each = 0 if config.offload == "host" else sizes.stream.hidden_bytes * tokens
    if not config.rebuilds_kv and config.offload != "host":
        each += height * sizes.cells[0].kv_bytes * tokens
    if config.offload != "host":
        each += height * sizes.cells[0].kept_bytes(config, num_tokens) * tokens
    return Simulated(peak_bytes=peak + missing * each, host_bytes=host, num_layers_run=run)


def check_groups(model: nn.Module, sizes: ModelSizes, config: ChunkConfig, **settings: Any) -> None:
    """Raises where one group more does not add what `simulate` takes it to.

    Raises:
        RuntimeError: the simulation of a few groups would be wrong.
    """
    few, more = (simulate(model, sizes, config, groups_run=num, **settings) for num in (1, 2))
    if abs(few.peak_bytes - more.peak_bytes) > 0.001 * more.peak_bytes:
        raise RuntimeError(
            f"{config}: 1 and 2 groups do not lead to the same peak ({few}, {more}): run all of them"
        )


def _run(
    model: nn.Module,
    num_layers: int,
    config: ChunkConfig,
    num_tokens: int,
    num_rows: int,
    autocast: torch.dtype | None,
    engine: Engine,
) -> tuple[int, int]:
    with ExitStack() as stack:
        mesh = stack.enter_context(_fake_ranks(engine.num_ranks)) if engine.name == "fsdp2" else None
        stack.enter_context(_disable_current_modes())
        stack.enter_context(undisturbed_rng(torch.empty(0)))
        stack.enter_context(FakeTensorMode())
        stack.enter_context(without_triton_kernels())
        twin: Any = twin_of(model, num_layers)
        chunked = ChunkedModel(causal_lm_of(twin.train()), config)
        chunked.context.attention = GpuAttention(config.attention)
        if num_layers < len(find_layers(causal_lm_of(model))[2]):
            twin.get_input_embeddings().register_forward_hook(lambda module, args, out: out.requires_grad_())
        if mesh is not None:
            layers = [layer.layer for layer in chunked.layers]
            _shard_as_accelerate(twin, layers, mesh, autocast, offloads=engine.offloads_weights)
        ids = torch.zeros(num_rows, num_tokens, dtype=torch.long)
        host = chunked.context.host
        with LiveBytes(exclude=[*twin.parameters(), *twin.buffers(), ids], host=host) as live:
            with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
                loss = loss_of(twin, ids)
            loss.backward()
        return live.peak_bytes, 0 if host is None else host.held_bytes


@contextmanager
def _fake_ranks(num_ranks: int) -> Iterator[DeviceMesh]:
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


def _shard_as_accelerate(
    model: nn.Module,
    layers: list[nn.Module],
    mesh: DeviceMesh,
    gathered: torch.dtype | None,
    *,
    offloads: bool,
) -> None:
    """Units as Accelerate 1.15 makes them (`fsdp2_prepare_model`): each layer, the embedding, the head with
    the norm; one for all three where they are tied.

    Args:
        gathered: The dtype in which weights are gathered and gradients reduced; `None`: as they are.
        offloads: Weights and gradients are on the host between uses. Here both memories are the CPU's: a
            gradient that has left for the host is let go.
    """
    settings: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype=gathered, reduce_dtype=gathered),
        "offload_policy": CPUOffloadPolicy(pin_memory=False) if offloads else OffloadPolicy(),
    }
    base = causal_lm_of(model)
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    for layer in layers:
        fully_shard(layer, **settings)
    tail = [base.get_decoder().norm, head]
    if head.weight is embedding.weight:
        tail.insert(1, embedding)
    else:
        fully_shard(embedding, **settings)
    fully_shard(tail, reshard_after_forward=False, **settings)
    fully_shard(model, **settings)
    if offloads:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(_let_go)


def _let_go(parameter: Tensor) -> None:
    parameter.grad = None
