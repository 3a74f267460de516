"""The peak of a step of the real code, on a machine without a GPU: fake tensors, live bytes counted op by op.

Where layers are alike, one group of them is run: what each other group adds is its input, and its K/V where
they are kept (none of which stays on the device with `offload="host"`). `check_groups` counts whether that
holds. Models whose layers differ, and steps with retained chunks, are run whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from chunkdist.config import ChunkConfig
from chunkdist.memory.cell_sizes import GpuAttention
from chunkdist.memory.live_bytes import LiveBytes
from chunkdist.memory.model_sizes import ModelSizes
from chunkdist.memory.twin import layer_kinds, twin_of
from chunkdist.replay import undisturbed_rng

_GROUPS_RUN = 1
"""Its input needs a gradient, as that of a group with others below it."""


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """Bytes over the weights.

    Args:
        peak_bytes: Of the device, all layers.
        host_bytes: Of the host, of the layers that were run.
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
) -> Simulated:
    """The largest sum of live tensors in a forward and backward, as flash attention on a GPU has them.

    Args:
        model: Chunked or not; its weights may be nowhere. Experts are not simulated as they are.
        sizes: Of `model`.
        config: Without `"auto"`.
    """
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    num_layers = len(sizes.cells)
    height = num_layers if config.layers_per_group == "all" else int(config.layers_per_group)
    alike = len(set(layer_kinds(base))) == 1 and not num_layers % height and not config.retained_chunks
    run = min(num_layers, groups_run * height) if alike else num_layers
    peak, host = _run(model, run, config, num_tokens, num_rows, autocast)
    missing = (num_layers - run) // height
    tokens = num_tokens * num_rows
    each = 0 if config.offload == "host" else sizes.stream.hidden_bytes * tokens
    if not config.rebuilds_kv and config.offload != "host":
        each += height * sizes.cells[0].kv_bytes * tokens
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
) -> tuple[int, int]:
    from chunkdist.modeling import chunk_model, host_memory, layers_of

    with _disable_current_modes(), undisturbed_rng(torch.empty(0)), FakeTensorMode():
        twin: Any = twin_of(model, num_layers)
        chunk_model(twin.train(), config)
        context = layers_of(twin)[0].group.context
        context.attention = GpuAttention(config.attention)
        context.probe = None
        twin.get_input_embeddings().register_forward_hook(lambda module, args, out: out.requires_grad_())
        ids = torch.zeros(num_rows, num_tokens, dtype=torch.long)
        host = host_memory(twin)
        with LiveBytes(exclude=[*twin.parameters(), *twin.buffers(), ids], host=host) as live:
            with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
                loss = twin(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
        return live.peak_bytes, 0 if host is None else host.held_bytes
