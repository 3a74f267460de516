"""Chunk samplers: which chunks SpaCO backpropagates, and with which weights (arXiv 2505.16710, section 4)."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class ChunkSampler(Protocol):
    """Anything with `draw`. Samplers of our own are not built yet: `sampler=None` is exact (SeCO)."""

    def draw(self, scores: Tensor) -> Tensor:
        """Draws the weights of one sequence's chunks.

        Args:
            scores: (k,), fp32, CPU: the norms of the chunks' output gradients.

        Returns:
            (k,): the weight of each chunk's gradient; 0 drops the chunk.
        """
        ...
