"""A layer's part of a running cell, and how its attention finds it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from chunkdist.attention import AttentionChoice
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
