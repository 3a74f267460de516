"""What a cell of a pipeline's stage runs on."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from chunkdist.stores.attention_outputs import AttentionOutputs
from chunkdist.stores.kv_store import KVStore
from chunkdist.stores.state_relay import StateRelay, StateStore
from chunkdist.stream.stream import Chunk, Stream


@dataclass(frozen=True)
class LayerStores:
    """What one layer of a stage keeps of a dependent run: keys and values, state other than these, and what
    attention returned, if it is kept."""

    kv: KVStore
    states: StateStore
    attention: AttentionOutputs | None = None


@dataclass(kw_only=True)
class CellInputs:
    """One micro-batch on one stage.

    Args:
        chunk: Its tokens, in the stream of its run.
        stores: The run's stores, by layer of the stage.
        model_inputs: (1, C) each: `input_ids`, `position_ids`, `shift_labels`.
    """

    chunk: Chunk
    stream: Stream
    stores: list[LayerStores]
    model_inputs: dict[str, Tensor]
    keeps_attention: bool = False
    """Whether attention takes its output from what is kept, and else keeps it, in the running pass."""
    hidden: Tensor | None = None
    """(1, C, H), what the layers begin with in the running pass; `None`: what the model makes of tokens."""
    result: Tensor | None = None
    """(1, C, H), what the layers end with in a pass that runs the head alone."""
    relays: list[StateRelay] = field(default_factory=list, init=False)
    """Caches of the layers that get their state through one, in the running pass."""
