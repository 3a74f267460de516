"""What runs on the ranks of `test_auto.py`."""

from __future__ import annotations

from typing import Any

import torch

from chunkdist import ChunkConfig, chunk_model
from chunkdist.chunking import chunk_report, resolve_auto_values
from chunkdist.memory import auto
from tests.helpers.models import tiny_llama


def chosen_by_rank(free_bytes: tuple[int, ...], num_tokens: tuple[int, ...]) -> tuple[Any, ...]:
    """The schedule that each rank runs after `"auto"` was resolved, each with its own memory and length."""
    rank = torch.distributed.get_rank()
    before = auto.free_bytes
    auto.free_bytes = lambda device: free_bytes[rank]
    try:
        model = chunk_model(
            tiny_llama(dtype=torch.float32),
            ChunkConfig(chunk_size="auto", layers_per_group="auto", retained_chunks="auto", offload="auto"),
        )
        resolve_auto_values(model, num_tokens=num_tokens[rank])
    finally:
        auto.free_bytes = before
    config = chunk_report(model).config
    return config.chunk_size, config.layers_per_group, config.retained_chunks, config.offload
