"""One layer of a group: its `forward` hands the call to the group, which runs the layer cell by cell."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import MethodType
from typing import Any, NoReturn, Self, SupportsIndex

import torch
from torch import Tensor, nn

from chunkdist.attention import AttentionChoice
from chunkdist.attention.cell import Cell, LayerState
from chunkdist.attention.heads import HeadExchange
from chunkdist.engine.context import ChunkContext
from chunkdist.errors import UnsupportedModelError
from chunkdist.models.arguments import SEGMENT_ARGUMENTS, LayerSignature
from chunkdist.stores.attention_outputs import AttentionOutputs
from chunkdist.stores.kv_store import KVStore
from chunkdist.stores.state_relay import StateKey, StateStore
from chunkdist.stream.stream import Chunk, Stream


class CopiedNotPickled:
    """A part of a chunked model: a copy of the model has its own."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        memo[id(self)] = twin = object.__new__(type(self))
        twin.__dict__ = copy.deepcopy(self.__dict__, memo)
        return twin

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError("a chunked model cannot be pickled: call unchunk_model first, or save_pretrained")


class GroupLayer(CopiedNotPickled):
    """Stands in for one layer's `forward`, set on the instance: hooks around its call run as before."""

    def __init__(self, layer: nn.Module, state: LayerState | None, context: ChunkContext) -> None:
        self.layer = layer
        self.state = state
        self.context = context
        self._own_forward: Callable[..., Any] | None = layer.__dict__.get("forward")
        """What was set on the instance before."""
        self.signature = LayerSignature(layer)
        self.cache_argument = self.signature.cache if state is not None and state.relays else None
        self.tuple_length: int | None = None
        """Length of the tuple that the layer returns, 0 for a tensor; known once it has run."""
        self.calls_attention = True
        """Whether the layer calls the attention function; known once it has run."""
        self.state_shapes: dict[StateKey, tuple[torch.Size, torch.dtype]] = {}
        """Shapes and dtypes of the state that the layer hands on; known once it has run."""
        self.on_call: Callable[[GroupLayer, Tensor, dict[str, Any]], Any]
        """What the layer's group makes of a call, set by it."""

    @property
    def original_forward(self) -> Callable[..., Any]:
        """What the layer would run; the forward of its class is that of now."""
        if self._own_forward is not None:
            return self._own_forward
        forward: Callable[..., Any] = MethodType(type(self.layer).forward, self.layer)
        return forward

    @original_forward.setter
    def original_forward(self, forward: Callable[..., Any]) -> None:
        self._own_forward = forward

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # a loop over chunks is not to be unrolled
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.context.stream is None:
            if self.state is not None and not self.context.bypassed and torch.is_grad_enabled():
                raise UnsupportedModelError(
                    f"{self.state.name} was called by something else than the forward of its decoder"
                )
            return self.original_forward(*args, **kwargs)
        hidden, arguments = self.signature.bind(args, kwargs)
        if not isinstance(hidden, Tensor):
            raise UnsupportedModelError(
                f"{type(self.layer).__name__} gets {type(hidden).__name__}, not hidden states, as layers "
                "with PEFT's Shadow do: what is in it cannot be cut into chunks; take another method"
            )
        if self.state is None and (arguments or hidden.ndim != 3):
            return self.original_forward(*args, **kwargs)
        return self.on_call(self, hidden, arguments)

    def cell(
        self,
        chunk: Chunk,
        stream: Stream,
        store: KVStore | None,
        states: StateStore,
        *,
        outputs: AttentionOutputs | None = None,
        stop_at_kv: bool = False,
        attention: AttentionChoice | None = None,
        exchange: HeadExchange | None = None,
    ) -> Cell | None:
        """The layer's part of a cell; `None` for modules that treat each token alone.

        Args:
            outputs, exchange: As in `Cell`.
            attention: `None`: the model's own choice.
        """
        if self.state is None:
            return None
        relay = None if self.cache_argument is None else states.relay(chunk, stream.before(chunk))
        choice = attention or self.context.attention
        return Cell(
            chunk,
            stream,
            store,
            choice,
            outputs=outputs,
            stop_at_kv=stop_at_kv,
            relay=relay,
            exchange=exchange,
        )

    def run(self, cell: Cell | None, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
        """The layer itself on one chunk (B, T, H)."""
        if self.state is not None:
            self.state.cell = cell
        if cell is not None and cell.relay is not None and self.cache_argument is not None:
            arguments = {key: x for key, x in arguments.items() if key not in SEGMENT_ARGUMENTS}
            arguments[self.cache_argument] = cell.relay
        try:
            output = self.original_forward(hidden, **arguments)
        finally:
            if self.state is not None:
                self.state.cell = None
        if cell is not None:
            self._check(cell)
        self.tuple_length = len(output) if isinstance(output, tuple) else 0
        if isinstance(output, tuple):
            output, *others = output
            if any(x is not None for x in others):
                raise UnsupportedModelError(f"{type(self.layer).__name__} returns more than hidden states")
        if not isinstance(output, Tensor):
            raise UnsupportedModelError(
                f"{type(self.layer).__name__} returns {type(output).__name__}, not a tensor"
            )
        return output

    def _check(self, cell: Cell) -> None:
        """Raises where a pass has connected tokens in a way that is not seen."""
        assert self.state is not None
        name, relayed = type(self.layer).__name__, cell.relay is not None and cell.relay.used
        self.calls_attention = cell.num_calls == 1
        if cell.outputs is not None and cell.outputs.was_changed():
            raise UnsupportedModelError(
                f"{name} changes in place what its attention returns, which is kept for the backward: write "
                "keep_attention=False"
            )
        if cell.relay is not None:
            self.state_shapes = {key: (x.shape, dtype) for key, (x, dtype) in cell.relay.ends.items()}
        if cell.num_calls > 1 or not (self.calls_attention or relayed or self.state.tokenwise):
            raise UnsupportedModelError(
                f"{name} called the attention function {cell.num_calls} times in a "
                "pass, not once: it keeps state between tokens that is not in its keys and values"
            )
        if self.state.mixes and not relayed:
            raise UnsupportedModelError(
                f"{name} has layers that look at other tokens, and keeps no state in its cache: it cannot be "
                "handed on from chunk to chunk"
            )

    def wrap(self, hidden: Tensor) -> Any:
        """`hidden`, in the form in which the layer returns it."""
        return (hidden, *(None,) * (self.tuple_length - 1)) if self.tuple_length else hidden
