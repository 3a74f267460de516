"""What one layer's attention returned in the forward, kept so that no kernel runs again in the backward.

A flash kernel's backward needs the output and the log-sum-exp of its forward beside q, k and v (arXiv
2205.14135, algorithm 4). Both are small: one more hidden state a token, and one number for each head.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from chunkdist.stores.by_chunk import TensorsByChunk
from chunkdist.stream.stream import Chunk


def new_attention_outputs(keeps_attention: bool | Literal["global"]) -> AttentionOutputs | None:
    """For one layer of a group, by `ChunkConfig.keeps_attention`."""
    return AttentionOutputs(only_global=keeps_attention == "global") if keeps_attention else None


class AttentionOutputs(TensorsByChunk[str]):
    """Outputs (B, T, N, D) and log-sum-exps (B, N, T), by chunk. B rows, T tokens, N query heads, D head
    dim.

    Args:
        only_global: Nothing is kept of a layer with a sliding window.
    """

    def __init__(self, *, only_global: bool = False) -> None:
        super().__init__()
        self._only_global = only_global
        self._given: tuple[Tensor, int] | None = None
        """The output that the layer goes on with, and how often it had been changed in place by then."""

    def are_kept(self, window: int | None) -> bool:
        """Whether those of a layer with this sliding window are."""
        return window is None or not self._only_global

    def write(self, chunk: Chunk, out_BTND: Tensor, lse_BNT: Tensor) -> None:
        """Keeps what a kernel has returned for a chunk."""
        self.keep(chunk.start, {"output": out_BTND, "log-sum-exp": lse_BNT})

    def read(self, chunk: Chunk) -> tuple[Tensor, Tensor] | None:
        """What was kept of a chunk; `None`: nothing. What is kept does not become a part of the reader's
        graph."""
        kept = self.at(chunk.start)
        return (kept["output"].detach(), kept["log-sum-exp"].detach()) if kept else None

    def lend(self, out_BTND: Tensor) -> None:
        """The layer goes on with this output, which shares its memory with what is kept."""
        self._given = out_BTND, out_BTND._version

    def was_changed(self) -> bool:
        """Whether the layer, now at its end, has changed what it was lent."""
        given, self._given = self._given, None
        return given is not None and given[0]._version != given[1]
