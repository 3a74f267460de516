"""`retained_chunks="auto"`: as many graphs as memory has room for beside all else that a step needs."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from chunkdist.memory.estimate import estimate_memory
from chunkdist.memory.host import free_host_bytes

if TYPE_CHECKING:
    from chunkdist.config import ChunkConfig
    from chunkdist.modeling import ChunkReport

USABLE_SHARE = {"cuda": 0.85, "cpu": 0.5}
"""Of the free memory: the rest is for what the estimate leaves out (a kernel's scratch space, the allocator's
gaps), on a CPU also for other processes."""


def free_bytes(device: torch.device) -> int:
    """Memory that this process could still take: of the GPU, what its allocator holds unused included; of the
    host, its share."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return free_host_bytes()


def choose_retained_chunks(
    model: nn.Module,
    config: ChunkConfig,
    report: ChunkReport,
    *,
    num_tokens: int,
    num_rows: int = 1,
    activation_bytes: int | None = None,
    optimizer: str = "",
    available_bytes: int | None = None,
) -> tuple[int, str]:
    """How many chunks of a stream can keep their graphs, and why so many.

    Weights lie in memory already; gradients and optimizer states count as if they did not yet.

    Args:
        report: Of `model`.
        num_tokens: Of the longest stream.
        num_rows, activation_bytes, optimizer: As in `estimate_memory`.
        available_bytes: What may be used; `None`: `USABLE_SHARE` of what is free.
    """
    device = next(model.parameters()).device
    if available_bytes is None:
        share = USABLE_SHARE.get(device.type, min(USABLE_SHARE.values()))
        available_bytes = int(free_bytes(device) * share)

    def needed_bytes(num_chunks: int) -> int:
        chosen = replace(config, retained_chunks=num_chunks)
        estimate = estimate_memory(
            model,
            chosen,
            replace(report, retained_chunks=num_chunks, rebuilds_kv=chosen.rebuilds_kv),
            num_tokens=num_tokens,
            num_rows=num_rows,
            activation_bytes=activation_bytes,
            optimizer=optimizer,
        )
        return estimate.peak_bytes - estimate.weights_bytes

    num_chunks = -(-num_tokens // report.chunk_size)
    low, high = 0, num_chunks
    while low < high:
        middle = (low + high + 1) // 2
        if needed_bytes(middle) <= available_bytes:
            low = middle
        else:
            high = middle - 1
    gib = 2**30
    reason = (
        f"auto: {low} of the {num_chunks} chunks of {num_tokens:,} tokens, a step then needs "
        f"{needed_bytes(low) / gib:.2f} GiB of {available_bytes / gib:.2f} GiB"
    )
    return low, reason
