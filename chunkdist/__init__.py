"""chunkdist: train causal language models on long sequences, chunk by chunk, with exact gradients."""

from chunkdist.chunking import ChunkReport, chunk_model, chunk_report, unchunk_model
from chunkdist.config import ChunkConfig
from chunkdist.errors import UnsupportedModelError
from chunkdist.models.extend import ContextExtension, extend_context
from chunkdist.spaco.samplers import (
    ChunkSampler,
    FixedBudgetSampler,
    ImportanceSampler,
    IndependentSampler,
    RunSampler,
)

__all__ = [
    "ChunkConfig",
    "ChunkReport",
    "ChunkSampler",
    "ContextExtension",
    "FixedBudgetSampler",
    "ImportanceSampler",
    "IndependentSampler",
    "RunSampler",
    "UnsupportedModelError",
    "chunk_model",
    "chunk_report",
    "extend_context",
    "unchunk_model",
]
