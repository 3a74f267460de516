"""Keys and values that the backward makes again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from chunkdist import ChunkConfig, chunk_model
from tests.helpers.models import batch, tiny_llama


class Casts(TorchDispatchMode):
    """Counts casts of fp32 matrices of one shape, as autocast makes them."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default and isinstance(args[0], Tensor):
            self.count += args[0].shape == self.shape and args[0].dtype == torch.float32
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("height", [1, 2])
def test_autocast_casts_weights_once_for_all_chunks(height: int) -> None:
    """In a backward: once for all chunks that are run again, and once for the keys and values of all."""
    model = tiny_llama(num_layers=2, dtype=torch.float32, intermediate_size=80)
    own = model.model.layers[0].self_attn.k_proj.weight
    chunk_model(model, ChunkConfig(chunk_size=10, layers_per_group=height, rebuild_kv=True))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch(num_tokens=60)).loss
    casts = Casts(own.shape)
    with casts:
        loss.backward()
    assert casts.count == 2 * 2 * (1 + 1)  # k_proj's and v_proj's of two layers
