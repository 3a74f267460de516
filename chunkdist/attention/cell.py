"""A layer's part of a running cell, and how its attention finds it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from chunkdist.attention import AttentionChoice
from chunkdist.attention.base import Span
from chunkdist.attention.heads import HeadExchange
from chunkdist.stores.attention_outputs import AttentionOutputs
from chunkdist.stores.kv_store import KVStore
from chunkdist.stores.state_relay import StateRelay
from chunkdist.stream.stream import Chunk, Stream

LAYER_ATTRIBUTE = "_chunkdist_layer"
"""Set on the modules inside a chunked layer: how `attend` finds the cell of the module that called it."""


class KeysAndValues(Exception):
    """Ends the run of a layer as soon as its keys and values are there, and carries them, (B, T, K, D)."""

    def __init__(self, k_BTKD: Tensor, v_BTKD: Tensor) -> None:
        super().__init__()
        self.k_BTKD, self.v_BTKD = k_BTKD, v_BTKD


@dataclass
class Cell:
    """One layer's part of a running cell.

    Args:
        chunk: The tokens, of this rank's part of `stream`.
        store: K/V of the layer; `None` where no attention is expected.
        outputs: Where the layer's attention takes its output from, if it is kept there, and else keeps it;
            `None`: the kernel runs, and nothing is kept.
        stop_at_kv: Raise `KeysAndValues` instead of attending.
        relay: The layer's cache, where layers keep state other than K/V.
        exchange: Between ranks that have the other parts: each attends with its heads, from all tokens of the
            chunk. `None`: there are no others.
    """

    chunk: Chunk
    stream: Stream
    store: KVStore | None
    choice: AttentionChoice
    outputs: AttentionOutputs | None = None
    stop_at_kv: bool = False
    relay: StateRelay | None = None
    exchange: HeadExchange | None = None
    num_calls: int = 0

    @property
    def whole(self) -> Stream:
        """The stream of all ranks."""
        return self.stream.whole or self.stream

    @property
    def tokens(self) -> Chunk:
        """The chunk's tokens of all ranks, as stores and kernels have them."""
        return self.stream.in_whole(self.chunk)

    def visible(self, row: int, window: int | None, block: int | None) -> tuple[int, tuple[Span, ...]]:
        """The first key that any query of this chunk sees, and the spans relative to it.

        Blocks of `block` tokens, counted from the start of a segment, are to attention what segments are.
        """
        chunk, starts, num_tokens = self.tokens, self.whole.segment_starts[row], self.whole.num_tokens
        ends = (*starts[1:], num_tokens)
        if block is not None:
            cuts = [range(start, end, block) for start, end in zip(starts, ends, strict=True)]
            starts = tuple(start for cut in cuts for start in cut)
            ends = (*starts[1:], num_tokens)
        origin, spans = None, []
        for seg_start, seg_end in zip(starts, ends, strict=True):
            q_start, q_end = max(seg_start, chunk.start), min(seg_end, chunk.end)
            if q_start >= q_end:
                continue
            k_start = seg_start if window is None else max(seg_start, q_start - window + 1)
            origin = k_start if origin is None else origin
            spans.append(Span(q_start - chunk.start, q_end - chunk.start, k_start - origin, q_end - origin))
        assert origin is not None
        return origin, tuple(spans)


@dataclass
class LayerState:
    """What the modules of one layer share: the cell that runs now, if any.

    Args:
        relays: Whether the layer gets a cache: one of the model's layers keeps state other than K/V.
        mixes: Whether it has modules that look at other tokens and are not attention.
        tokenwise: Whether each token passes through it alone.
    """

    name: str
    relays: bool = False
    mixes: bool = False
    tokenwise: bool = False
    cell: Cell | None = None
