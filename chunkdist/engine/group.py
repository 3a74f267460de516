"""The layer group: consecutive layers as one autograd node that runs them chunk by chunk.

SeCO (arXiv 2505.16710, algorithm 1) and the retained chunks of ChunkFlow (arXiv 2503.02356, algorithm 2),
turned inside out: not a training loop with a backward per chunk, but one forward and one backward whose
inside is the loop.

- forward: chunks ascending, without a graph; each layer's K and V are appended to its store. The group's
  input is kept, on the host if so configured.
- backward: chunks descending; each is run again with a graph, and its gradient goes to the group's input, to
  the parameters, and to the K and V of the chunks before it.

The node's inputs are the group's hidden states (B, T, H) and its trainable parameters; a parameter's gradient
comes out once, summed over the chunks in at least fp32. Its outputs are hidden states, and router logits if
they are wanted.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from chunkdist.engine import router_logits
from chunkdist.engine.as_run import LayersAsRun, Notes
from chunkdist.engine.cell import CellGraph, CellOutput, rerun, retain
from chunkdist.engine.context import ChunkContext
from chunkdist.engine.group_input import GroupInput, Hidden, tokens_of
from chunkdist.engine.kv_rebuild import KVRebuild, rebuild_parts
from chunkdist.engine.layer import GroupLayer
from chunkdist.engine.node import as_node, passed_on
from chunkdist.engine.parameters import GroupParameters
from chunkdist.engine.rerun_witness import RerunWitness
from chunkdist.engine.saved import Saved
from chunkdist.engine.written_buffers import WrittenBuffers
from chunkdist.errors import UnsupportedModelError
from chunkdist.models.arguments import refuse_arguments, slice_tokens
from chunkdist.recovery import attempt
from chunkdist.replay import AutocastState, RngState, no_leaf, undisturbed_rng, without_autocast
from chunkdist.sharding import zero3
from chunkdist.sharding.fsdp2 import GroupUnits, refuse_inner_units
from chunkdist.stores.kv_store import KVStore
from chunkdist.stores.state_relay import StateStore
from chunkdist.stream.stream import Chunk, Stream


class LayerGroup:
    """Consecutive layers that run as one node. Its first layers pass the hidden states on, its last one runs
    all."""

    def __init__(self, layers: Sequence[GroupLayer], context: ChunkContext) -> None:
        self.layers = tuple(layers)
        self.context = context
        self.is_decoder = any(layer.state is not None for layer in layers)
        """Whether these are decoder layers, not modules that treat each token alone."""
        self.is_last = False
        """Whether these are the last decoder layers."""
        self.num_above = 0
        """Groups of decoder layers that run after this one."""
        self.is_cut = False
        """Whether this is a part of a group; a unit of FSDP2 may then hold layers of several groups."""
        self.notes = Notes()
        for layer in layers:
            layer.on_call = self.call

    def alone(self, layer: GroupLayer) -> LayerGroup:
        """A group of one of these layers, for a forward without a graph."""
        group = copy.copy(self)
        group.layers, group.is_decoder, group.is_cut = (layer,), layer.state is not None, True
        return group

    def call(self, layer: GroupLayer, hidden: Tensor, arguments: dict[str, Any]) -> Any:
        """What `layer.forward(hidden, **arguments)` returns in a chunked step."""
        if self.context.layer_by_layer and not self.is_cut:
            return self.alone(layer).call(layer, hidden, arguments)
        stream = self.context.stream
        assert stream is not None
        refuse_arguments(layer.layer, hidden, arguments, stream)
        position = self.layers.index(layer)
        run = self.context.open_call
        if position == 0 and run is None:
            run = GroupCall(self, stream)
        if not isinstance(run, GroupCall) or run.group is not self or len(run.arguments) != position:
            raise UnsupportedModelError(
                "the decoder does not call its layers one after another: write layers_per_group=1, not "
                f"{len(self.layers)}"
            )
        self.context.open_call = run
        refuse_inner_units(layer.layer)
        run.add(hidden, arguments)
        if layer is not self.layers[-1]:
            if layer.tuple_length is None:
                run.learn_output_form(layer)
            return layer.wrap(passed_on(hidden))
        self.context.open_call = None
        return layer.wrap(run(hidden))


class GroupCall:
    """One forward of a group, and what its backward needs."""

    def __init__(self, group: LayerGroup, stream: Stream) -> None:
        self.group = group
        self.stream = stream
        self.arguments: list[dict[str, Any]] = []
        modules = [layer.layer for layer in group.layers]
        if group.layers[0].state is not None:
            zero3.check_group(modules)
        self.units = GroupUnits(modules, may_be_larger=group.is_cut, shares_rows=stream.whole is not None)
        self.units.keep()
        self._input = GroupInput(len(modules))
        self._stores: list[KVStore | None] = []
        """By layer, of the dependent run at hand."""
        self._rng: list[RngState] = []
        self._as_run: LayersAsRun
        self._witness = RerunWitness(modules)
        self._autocast: AutocastState
        self._sample = group.context.sample
        parts = group.context.parts
        self._exchange = None if parts is None else parts.group.heads
        self._retained: dict[int, CellGraph] = {}
        """By chunk index, of the cells whose graph is kept."""
        self._wants_router_logits = group.is_decoder and router_logits.are_wanted()
        self.saved = Saved(
            stream,
            len(modules),
            group.context.host,
            group.num_above,
            reads_retained=group.context.config.uses_control_variate,
            keeps_attention=self.group.is_decoder and group.context.config.keeps_attention,
        )

    def abandon(self) -> None:
        """FSDP2's units are released where the group's last layer will not be called."""
        self.units.release()

    def give_up(self) -> None:
        self._stores, self._retained = [], {}

    def give_up_backward(self) -> None:
        self.give_up()
        self.units.gather()  # as the other ranks do

    def add(self, hidden: Tensor, arguments: dict[str, Any]) -> None:
        """Records one layer's arguments; all layers must get the same hidden states."""
        self._input.add(hidden)
        self.arguments.append(arguments)

    def __call__(self, hidden: Tensor) -> Tensor:
        context = self.group.context
        try:
            with (
                router_logits.recorded(False),
                context.checked(self.group.layers, self.arguments, hidden, self.stream, context.row_tokens),
            ):
                output, *found = self._call(hidden)
        finally:
            self.units.release()
            self.saved.settle()
        router_logits.deliver(found, context.labels.mask)
        return output

    def _call(self, hidden: Tensor) -> tuple[Tensor, ...]:
        self._input.release()
        self.parameters = GroupParameters(layer.layer for layer in self.group.layers)
        if torch.is_grad_enabled() and (hidden.requires_grad or self.parameters.trainable):
            return as_node(self, hidden)
        with torch.no_grad():
            return attempt(
                lambda: self.forward(hidden, retained=(), for_backward=False),
                lambda: self.without_memory(hidden),
            )

    def learn_output_form(self, layer: GroupLayer) -> None:
        """Runs `layer` on the first token alone, to see whether it returns a tensor or a tuple."""
        self._run_first_token(layer, self._input.hidden, self.arguments[-1])

    def _run_first_token(self, layer: GroupLayer, hidden: Tensor, arguments: dict[str, Any]) -> list[Tensor]:
        """Returns the router logits."""
        token = Chunk(0, 1)
        stream = Stream(num_tokens=1, chunks=(token,), segment_starts=((0,),) * hidden.shape[0])
        with (
            torch.no_grad(),
            undisturbed_rng(hidden),
            router_logits.recorded(self._wants_router_logits) as found,
        ):
            cell = layer.cell(token, stream, self._new_store(layer, token), StateStore())
            layer.run(cell, tokens_of(hidden, token), slice_tokens(arguments, token, self.stream.num_tokens))
        return found

    def without_memory(self, hidden: Tensor) -> tuple[Tensor, ...]:
        whole = router_logits.WholeSequence(hidden.shape[0], self.stream.num_tokens)
        if self._wants_router_logits:
            for layer, arguments in zip(self.group.layers, self.arguments, strict=True):
                whole.add_placeholders(self._run_first_token(layer, hidden, arguments))
        return hidden, *whole.take()

    def forward_and_save(self, hidden: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        outputs = self.forward(hidden, self.group.context.retained_chunks(self.stream))
        return outputs, self.saved.leave_device(hidden)

    def backward_from(
        self, saved: Sequence[Tensor], grad_outputs: Sequence[Tensor]
    ) -> tuple[Tensor | None, ...]:
        return self.backward(self.saved.come_back(saved), *grad_outputs)

    def forward(
        self, hidden: Tensor, retained: Collection[int], *, for_backward: bool = True
    ) -> tuple[Tensor, ...]:
        """Runs all chunks without a graph, but those of the indices `retained`.

        Returns:
            Hidden states (B, T, H), and the router logits of the whole sequence, if they are wanted.
        """
        chunks = self.stream.chunks
        whole = router_logits.WholeSequence(hidden.shape[0], self.stream.num_tokens)
        self._autocast = AutocastState.capture(hidden.device.type)
        buffers = WrittenBuffers(layer.layer for layer in self.group.layers)
        runs = {run.start: run for run in self.stream.runs()}
        output = None
        for index, chunk in enumerate(chunks):
            self._rng.append(RngState.capture(hidden))
            if (run := runs.get(index)) is not None:
                self._begin_run(run)
                if len(run) > 1 and not self.group.context.config.rebuilds_kv:
                    self.saved.keep_kv(run, self._stores)  # one chunk alone stores its own again when rerun
            if index in retained:
                part, relays, found = self._retain(index, hidden)
            else:
                part, relays, found = self._run_layers(chunk, tokens_of(hidden, chunk), keeps=for_backward)
            if for_backward and index not in retained:
                self._witness.note(index, part)
            whole.add(chunk, found)
            for relay in relays:
                if relay.used:
                    relay.hand_on(self.stream.behind(chunk))
                if not for_backward:
                    relay.forget()
            if for_backward:
                self.saved.send(index, hidden, retained)
            if len(chunks) == 1:
                output = part
                break
            if output is None:
                output = part.new_empty((part.shape[0], self.stream.num_tokens, *part.shape[2:]))
            output[:, chunk.start : chunk.end] = part
        assert output is not None
        buffers.refuse()
        self._stores = []
        self.parameters.release()
        self._autocast.forget_casts()  # else those of all groups would wait for the forward's end
        if for_backward:
            self._as_run = self.group.notes.take([layer.layer for layer in self.group.layers])
        return output, *whole.take()

    def backward(self, hidden: Hidden, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the hidden states and of each trainable parameter."""
        self.units.gather()
        with self._as_run.restored():
            grads = self._backward(hidden, *grad_outputs)
        self._witness.refuse_others()
        return grads

    def _backward(
        self, hidden: Hidden, grad_output: Tensor, *grads_router_logits: Tensor
    ) -> tuple[Tensor | None, ...]:
        self.parameters.restore()
        weights = self._chunk_weights(grad_output)
        sampled = [index for index, weight in enumerate(weights) if weight]
        kv = KVRebuild(self.stream, self.group.layers, self._rng, self._autocast, self._run_layers)
        zeros = grad_output.new_zeros
        grad_hidden = zeros(hidden.shape, dtype=hidden.dtype) if hidden.requires_grad else None
        rebuilds = self.group.is_decoder and self._sample is None
        with (
            undisturbed_rng(grad_output),
            self._autocast.apply(),  # around all cells, so that weights are cast once
            self.group.context.attention_installed(),
            self.saved.read_back(hidden, sampled, num_rebuilt=kv.num_layers if rebuilds else 0),
        ):
            for run in reversed(self.stream.runs()):
                self._stores = self.saved.take_stores(run)
                if not self._stores:
                    self._begin_run(run)
                    if self.group.is_decoder:
                        kv.write(hidden, sampled, run, self._stores)
                self._weigh_relays()
                variates = {}
                if self._sample is not None and self.group.context.config.uses_control_variate:
                    parts = rebuild_parts(self.stream, run, sampled, self._rng, between_sampled=True)
                    variates = {part[-1]: part for part in parts}
                for index in reversed(run):
                    if (part := variates.get(index)) is not None and (store := self._stores[0]) is not None:
                        with self.parameters.aliased():
                            kv.add_control_variate(part, hidden, store)
                    grads = grad_output, *grads_router_logits
                    self._backward_cell(index, hidden, grads, grad_hidden, weights[index])
        self._stores = []
        return grad_hidden, *self.parameters.take_grads(unused_as_zeros=self._sample is not None)

    def _backward_cell(
        self,
        index: int,
        hidden: Hidden,
        grad_outputs: Sequence[Tensor],
        grad_hidden: Tensor | None,
        weight: float,
    ) -> None:
        """Adds what comes back through one chunk."""
        chunk = self.stream.chunks[index]
        cell = self._retained.pop(index, None)
        if not weight:
            return
        cell = cell or self._rerun(index, hidden)
        grad, *grads = (
            router_logits.of_chunk(x, chunk, len(self.stream.segment_starts)) for x in grad_outputs
        )
        found = cell.output.router_logits
        grads = [grad.reshape(x.shape) * weight for x, grad in zip(found, grads, strict=True)]
        with without_autocast(grad.device.type):  # the forward's operations know theirs
            grad_leaf = cell.backward(grad * weight if self.group.is_last else grad, grads)
        self.parameters.add_small()
        if grad_hidden is not None and grad_leaf is not None:
            grad_hidden[:, chunk.start : chunk.end] = grad_leaf

    def _chunk_weights(self, grad_output: Tensor) -> tuple[float, ...]:
        """SpaCO's weight of each chunk; all 1 without a sampler, and for modules that treat each token
        alone."""
        if self._sample is None or not self.group.is_decoder:
            return (1.0,) * len(self.stream.chunks)
        if self.group.is_last:
            self._sample.draw(grad_output)
        return self._sample.weights

    def _weigh_relays(self) -> None:
        if self._sample is None or self._sample.relays is None or not self.group.is_decoder:
            return
        for store in self._stores:
            if store is not None:
                store.weigh_relays(
                    [self.stream.in_whole(chunk) for chunk in self.stream.chunks],
                    self._sample.relays,
                    keep_unweighted=self.group.context.config.uses_control_variate,
                )

    def _retain(self, index: int, hidden: Tensor) -> CellOutput:
        chunk = self.stream.chunks[index]
        leaf = self.saved.leaf(hidden, chunk)
        cell = retain(leaf, lambda: self._run_layers(chunk, no_leaf(leaf), keeps=False), self.parameters)
        self._retained[index] = cell
        return cell.output._replace(hidden=cell.output.hidden.detach())

    def _rerun(self, index: int, hidden: Hidden) -> CellGraph:
        chunk = self.stream.chunks[index]
        self._rng[index].restore()
        with self._autocast.apply():
            leaf = self.saved.leaf(hidden, chunk)
            cell = rerun(leaf, lambda: self._run_layers(chunk, no_leaf(leaf)), self.parameters)
        self._witness.compare(index, cell.output.hidden)
        return cell

    def _run_layers(
        self, chunk: Chunk, hidden: Tensor, *, keeps: bool = True, stop_at_kv: int = 0
    ) -> CellOutput:
        """The layers on one chunk.

        Args:
            keeps: Whether attention takes its output from what is kept, and else keeps it.
            stop_at_kv: The layer, counted from 1, that raises `KeysAndValues`; 0: none.
        """
        relays = []
        saved = zip(self._stores, self.saved.states, self.saved.attention, strict=True)
        with (
            self.group.notes.own_call(),
            router_logits.recorded(self._wants_router_logits) as found,
        ):
            for number, (layer, arguments, (store, states, outputs)) in enumerate(
                zip(self.group.layers, self.arguments, saved, strict=True), start=1
            ):
                kept, stops = outputs if keeps else None, number == stop_at_kv
                cell = layer.cell(
                    chunk,
                    self.stream,
                    store,
                    states,
                    outputs=kept,
                    stop_at_kv=stops,
                    exchange=self._exchange,
                )
                hidden = layer.run(cell, hidden, slice_tokens(arguments, chunk, self.stream.num_tokens))
                if cell is not None and cell.relay is not None:
                    relays.append(cell.relay)
        return CellOutput(hidden, relays, found)

    def _begin_run(self, run: range) -> None:
        """New stores, for the keys and values of a dependent run: no other chunk reads them."""
        tokens = self.stream.tokens_of(run)
        self._stores = [self._new_store(layer, tokens) for layer in self.group.layers]

    def _new_store(self, layer: GroupLayer, tokens: Chunk) -> KVStore | None:
        if layer.state is None:
            return None
        return KVStore(self.stream.in_whole(tokens), self.group.context.config.kv_grad_dtype)
