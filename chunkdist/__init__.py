"""chunkdist: train causal language models on long sequences, chunk by chunk, with exact gradients."""

from chunkdist.chunking import chunk_model, unchunk_model
from chunkdist.config import ChunkConfig
from chunkdist.errors import UnsupportedModelError
from chunkdist.spaco.samplers import (
    ChunkSampler,
    FixedBudgetSampler,
    ImportanceSampler,
    IndependentSampler,
    RunSampler,
)

__all__ = [
    "ChunkConfig",
    "ChunkSampler",
    "FixedBudgetSampler",
    "ImportanceSampler",
    "IndependentSampler",
    "RunSampler",
    "UnsupportedModelError",
    "chunk_model",
    "unchunk_model",
]
