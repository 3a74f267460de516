"""The layer group: consecutive layers as one autograd node that runs them chunk by chunk.

SeCO (arXiv 2505.16710, algorithm 1) and the retained chunks of ChunkFlow (arXiv 2503.02356, algorithm 2),
turned inside out: not a training loop with a backward per chunk, but one forward and one backward whose
inside is the loop.

- forward: chunks ascending, without a graph; each layer's K and V are appended to its store. The group's
  input is kept, on the host if so configured.
- backward: chunks descending; each is run again with a graph, and its gradient goes to the group's input, to
  the parameters, and to the K and V of the chunks before it.

The node's inputs are the group's hidden states (B, T, H) and its trainable parameters; a parameter's gradient
comes out once, summed over the chunks in at least fp32.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from chunkdist.attention.function import KeysAndValues
from chunkdist.engine.as_run import LayersAsRun, Notes
from chunkdist.engine.cell import CellGraph
from chunkdist.engine.context import ChunkContext
from chunkdist.engine.group_input import GroupInput, Hidden, tokens_of
from chunkdist.engine.kv_rebuild import projected_parts
from chunkdist.engine.layer import GroupLayer
from chunkdist.engine.node import as_node, passed_on
from chunkdist.engine.parameters import GroupParameters
from chunkdist.engine.saved import Kept
from chunkdist.errors import UnsupportedModelError
from chunkdist.models.arguments import refuse_arguments, slice_tokens
from chunkdist.recovery import attempt
from chunkdist.replay import AutocastState, RngState, undisturbed_rng
from chunkdist.sharding import zero3
from chunkdist.sharding.fsdp2 import GroupUnits, refuse_inner_units
from chunkdist.stores.kv_store import KVStore
from chunkdist.stores.state_relay import StateRelay, StateStore
from chunkdist.stream.stream import Chunk, Stream


class LayerGroup:
    """Consecutive layers that run as one node. Its first layers pass the hidden states on, its last one runs
    all."""

    def __init__(self, layers: Sequence[GroupLayer], context: ChunkContext) -> None:
        self.layers = tuple(layers)
        self.context = context
        self.attends = any(layer.state is not None for layer in layers)
        self.is_last = False
        """Whether these are the last decoder layers."""
        self.num_above = 0
        """Groups of decoder layers that run after this one."""
        self.is_cut = False
        """Whether this is a part of a group; a unit of FSDP2 may then hold layers of several groups."""
        self.notes = Notes()
        for layer in layers:
            layer.group = self

    def alone(self, layer: GroupLayer) -> LayerGroup:
        """A group of one of these layers, for a forward without a graph."""
        group = copy.copy(self)
        group.layers, group.attends, group.is_cut = (layer,), layer.state is not None, True
        return group

    def call(self, layer: GroupLayer, hidden: Tensor, arguments: dict[str, Any]) -> Any:
        """What `layer.forward(hidden, **arguments)` returns in a chunked step."""
        stream = self.context.stream
        assert stream is not None
        refuse_arguments(layer.layer, hidden, arguments, stream)
        position = self.layers.index(layer)
        run = self.context.open_run
        if position == 0 and run is None:
            run = GroupRun(self, stream)
        if run is None or run.group is not self or len(run.arguments) != position:
            raise UnsupportedModelError(
                "the decoder does not call its layers one after another: write layers_per_group=1, not "
                f"{len(self.layers)}"
            )
        self.context.open_run = run
        refuse_inner_units(layer.layer)
        run.add(hidden, arguments)
        if layer is not self.layers[-1]:
            if layer.tuple_length is None:
                run.learn_output_form(layer)
            return layer.wrap(passed_on(hidden))
        self.context.open_run = None
        return layer.wrap(run(hidden))


class GroupRun:
    """One forward of a group, and what its backward needs."""

    def __init__(self, group: LayerGroup, stream: Stream) -> None:
        self.group = group
        self.stream = stream
        self.arguments: list[dict[str, Any]] = []
        modules = [layer.layer for layer in group.layers]
        if group.layers[0].state is not None:
            zero3.check_group(modules)
        self.units = GroupUnits(modules, may_be_larger=group.is_cut)
        self.units.keep()
        self._input = GroupInput(len(modules))
        self._stores: list[KVStore | None] = []
        """By layer, of the dependent run at hand."""
        self._rng: list[RngState] = []
        self._as_run: LayersAsRun
        self._autocast: AutocastState
        self._sample = group.context.sample
        self._retained: dict[int, CellGraph] = {}
        """By chunk index, of the cells whose graph is kept."""
        self.kept = Kept(stream, len(modules), group.context, group.num_above)

    def drop(self) -> None:
        """Lets go of what was kept for the backward."""
        self._stores, self._retained = [], {}

    def add(self, hidden: Tensor, arguments: dict[str, Any]) -> None:
        """Records one layer's arguments; all layers must get the same hidden states."""
        self._input.add(hidden)
        self.arguments.append(arguments)

    def __call__(self, hidden: Tensor) -> Tensor:
        context = self.group.context
        try:
            with context.additions.asked(
                self.group.layers, self.arguments, hidden, self.stream, context.probe
            ):
                return self._call(hidden)
        finally:
            self.units.release()
            self.kept.settle()

    def _call(self, hidden: Tensor) -> Tensor:
        self._input.release()
        if (probe := self.group.context.probe) is not None:
            for layer, arguments in zip(self.group.layers, self.arguments, strict=True):
                if layer.state is not None:
                    probe.check(layer, hidden, arguments, self.stream)
        self.parameters = GroupParameters(layer.layer for layer in self.group.layers)
        if torch.is_grad_enabled() and (hidden.requires_grad or self.parameters.trainable):
            return as_node(self, hidden)
        with torch.no_grad():
            return attempt(lambda: self.forward(hidden, retained=(), for_backward=False), lambda: hidden)

    def learn_output_form(self, layer: GroupLayer) -> None:
        """Runs `layer` on the first token alone, to see whether it returns a tensor or a tuple."""
        hidden = self._input.hidden
        token = Chunk(0, 1)
        stream = Stream(num_tokens=1, chunks=(token,), segment_starts=((0,),) * hidden.shape[0])
        with torch.no_grad(), undisturbed_rng(hidden):
            cell = layer.cell(token, stream, self._new_store(layer, token), StateStore())
            layer.run(
                cell,
                tokens_of(hidden, token),
                slice_tokens(self.arguments[-1], token, self.stream.num_tokens),
            )

    def forward(self, hidden: Tensor, retained: Collection[int], *, for_backward: bool = True) -> Tensor:
        """Runs all chunks without a graph, but those of the indices `retained`. (B, T, H) to (B, T, H)."""
        chunks = self.stream.chunks
        self._autocast = AutocastState.capture(hidden.device.type)
        runs = {run.start: run for run in self.stream.runs()}
        output = None
        for index, chunk in enumerate(chunks):
            self._rng.append(RngState.capture(hidden))
            if (run := runs.get(index)) is not None:
                self._begin_run(run)
                if len(run) > 1 and not self.group.context.config.rebuilds_kv:
                    self.kept.keep(run, self._stores)  # one chunk alone stores its own again when rerun
            if index in retained:
                part, relays = self._retain(index, hidden)
            else:
                part, relays = self._run_layers(chunk, tokens_of(hidden, chunk))
            for relay in relays:
                if relay.used and self.stream.is_read_later(index, range(len(chunks))):
                    relay.hand_on()
                if not for_backward:
                    relay.forget()
            if for_backward:
                self.kept.send(index, hidden, retained)
            if len(chunks) == 1:
                output = part
                break
            if output is None:
                output = part.new_empty((part.shape[0], self.stream.num_tokens, *part.shape[2:]))
            output[:, chunk.start : chunk.end] = part
        assert output is not None
        self._stores = []
        self.parameters.release()
        if for_backward:
            self._as_run = self.group.notes.take([layer.layer for layer in self.group.layers])
        return output

    def backward(self, hidden: Hidden, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the hidden states and of each trainable parameter."""
        self.units.gather()
        with self._as_run.restored():
            return self._backward(hidden, grad_output)

    def _backward(self, hidden: Hidden, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        self.parameters.restore()
        weights = self._chunk_weights(grad_output)
        kept = [index for index, weight in enumerate(weights) if weight]
        zeros = grad_output.new_zeros
        grad_hidden = zeros(hidden.shape, dtype=hidden.dtype) if hidden.requires_grad else None
        with (
            undisturbed_rng(grad_output),
            self.group.context.attention_installed(),
            self.kept.read_back(hidden, kept, rebuild=self.group.attends and self._sample is None),
        ):
            for run in reversed(self.stream.runs()):
                self._stores = self.kept.take_stores(run)
                if not self._stores:
                    self._rebuild_kv(hidden, kept, run)
                self._weigh_relays()
                variates = {}
                if self._sample is not None and self.group.context.config.uses_control_variate:
                    parts = projected_parts(self.stream, run, kept, self._rng, between_kept=True)
                    variates = {part[-1]: part for part in parts}
                for index in reversed(run):
                    if (part := variates.get(index)) is not None:
                        self._add_control_variate(part, hidden)
                    self._backward_cell(index, hidden, grad_output, grad_hidden, weights[index])
        self._stores = []
        return grad_hidden, *self.parameters.take_grads(unused_as_zeros=self._sample is not None)

    def _backward_cell(
        self,
        index: int,
        hidden: Hidden,
        grad_output: Tensor,
        grad_hidden: Tensor | None,
        weight: float,
    ) -> None:
        """Adds what comes back through one chunk."""
        chunk = self.stream.chunks[index]
        cell = self._retained.pop(index, None)
        if not weight:
            return
        cell = cell or self._rerun(index, hidden)
        grad = grad_output[:, chunk.start : chunk.end]
        grad_leaf = cell.backward(grad * weight if self.group.is_last else grad)
        if grad_hidden is not None and grad_leaf is not None:
            grad_hidden[:, chunk.start : chunk.end] = grad_leaf

    def _chunk_weights(self, grad_output: Tensor) -> tuple[float, ...]:
        """SpaCO's weight of each chunk; all 1 without a sampler, and for modules that treat each token
        alone."""
        if self._sample is None or not self.group.attends:
            return (1.0,) * len(self.stream.chunks)
        if self.group.is_last:
            self._sample.draw(grad_output)
        return self._sample.weights

    def _weigh_relays(self) -> None:
        if self._sample is None or self._sample.relays is None or not self.group.attends:
            return
        for store in self._stores:
            if store is not None:
                store.weigh_relays(
                    self.stream.chunks,
                    self._sample.relays,
                    keep_unweighted=self.group.context.config.uses_control_variate,
                )

    def _add_control_variate(self, part: range, hidden: Hidden) -> None:
        """What the weights have left out of the K/V gradient of these chunks reaches the parameters of the
        norm and the k/v projections without a rerun. Its mean over the samples is 0."""
        if (store := self._stores[0]) is None:
            return
        left_out = store.left_out_of(self._tokens_of(part))
        if not left_out:
            return
        with torch.enable_grad(), self._autocast.apply(), self.parameters.aliased():
            found = self._keys_and_values(part, hidden)
        pairs = [(x, grads.to(x.dtype)) for x, grads in zip(found, left_out, strict=True) if x.requires_grad]
        if pairs:
            torch.autograd.backward([x for x, _ in pairs], [grads for _, grads in pairs])

    def _tokens_of(self, part: range) -> Chunk:
        return Chunk(self.stream.chunks[part[0]].start, self.stream.chunks[part[-1]].end)

    def _retain(self, index: int, hidden: Tensor) -> tuple[Tensor, list[StateRelay]]:
        with torch.enable_grad(), self.parameters.saved_as_reference():
            cell = self._retained[index] = self._run_with_graph(index, hidden)
        return cell.output.detach(), cell.relays

    def _rerun(self, index: int, hidden: Hidden) -> CellGraph:
        self._rng[index].restore()
        with torch.enable_grad(), self._autocast.apply():
            return self._run_with_graph(index, hidden)

    def _run_with_graph(self, index: int, hidden: Hidden) -> CellGraph:
        chunk = self.stream.chunks[index]
        leaf = self.kept.leaf(hidden, chunk)
        with self.parameters.aliased():
            return CellGraph(leaf, *self._run_layers(chunk, leaf))

    def _run_layers(
        self, chunk: Chunk, hidden: Tensor, *, stop_at_kv: bool = False
    ) -> tuple[Tensor, list[StateRelay]]:
        """The layers on one chunk, and the caches through which those with state have got theirs."""
        relays = []
        for layer, arguments, store, states in zip(
            self.group.layers, self.arguments, self._stores, self.kept.states, strict=True
        ):
            cell = layer.cell(chunk, self.stream, store, states, stop_at_kv=stop_at_kv)
            hidden = layer.run(cell, hidden, slice_tokens(arguments, chunk, self.stream.num_tokens))
            if cell is not None and cell.relay is not None:
                relays.append(cell.relay)
        return hidden, relays

    def _keys_and_values(self, part: range, hidden: Hidden) -> tuple[Tensor, Tensor]:
        """Of a one-layer group: runs chunks up to their attention."""
        tokens = self._tokens_of(part)
        self._rng[part[0]].restore()
        try:
            self._run_layers(tokens, tokens_of(hidden, tokens).detach(), stop_at_kv=True)
        except KeysAndValues as found:
            return found.k_BTKD, found.v_BTKD
        raise AssertionError("the layer ran to its end without attending")

    def _begin_run(self, run: range) -> None:
        """New stores, for the keys and values of a dependent run: no other chunk reads them."""
        tokens = self._tokens_of(run)
        self._stores = [self._new_store(layer, tokens) for layer in self.group.layers]

    def _rebuild_kv(self, hidden: Hidden, kept: list[int], run: range) -> None:
        """Stores the keys and values that the run's chunks to be rerun read of other chunks; they store their
        own."""
        self._begin_run(run)
        if not self.group.attends:
            return
        one_layer = len(self.group.layers) == 1
        drops = len(kept) < len(self.stream.chunks)
        if one_layer and drops:  # else sizes stay those of the forward, and so does each bit
            parts = projected_parts(self.stream, run, kept, self._rng, between_kept=False)
        else:
            parts = [range(i, i + 1) for i in run if self.stream.is_read_later(i, kept)]
        with torch.no_grad(), self._autocast.apply():
            for part in parts:
                if not one_layer:
                    self._rng[part[0]].restore()
                    self._run_layers(chunk := self._tokens_of(part), tokens_of(hidden, chunk))
                elif (store := self._stores[0]) is not None and self.group.layers[0].attends:
                    store.write(self._tokens_of(part), *self._keys_and_values(part, hidden))

    def _new_store(self, layer: GroupLayer, tokens: Chunk) -> KVStore | None:
        return None if layer.state is None else KVStore(tokens, self.group.context.config.kv_grad_dtype)
