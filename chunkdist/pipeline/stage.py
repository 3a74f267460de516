"""A stage of a causal LM: the model itself, with the layers of other stages emptied.

No code for any particular model: a stage calls the whole model's forward on one chunk. The layers of other
stages pass on what they get; the stage's first layer takes what the stage before has sent, in the place of
what the model made of it; its last one ends the forward. Names of parameters and modules stay.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from chunkdist.attention.cell import LAYER_ATTRIBUTE, LayerState
from chunkdist.config import ChunkConfig
from chunkdist.engine.additions import Additions
from chunkdist.engine.chunked_model import HANDLE
from chunkdist.engine.context import ChunkContext
from chunkdist.engine.layer import GroupLayer
from chunkdist.engine.parameters import GroupParameters
from chunkdist.engine.probe import LayerProbe, needs_probe
from chunkdist.engine.rerun_witness import RerunWitness
from chunkdist.engine.written_buffers import WrittenBuffers
from chunkdist.errors import UnsupportedModelError
from chunkdist.loss.lazy_logits import lazy_logits
from chunkdist.loss.token_losses import TokenLosses
from chunkdist.models.arguments import LayerSignature, refuse_arguments
from chunkdist.models.layers import configs_of, find_layers, layer_states, norms_of, refuse_known
from chunkdist.pipeline.cell_inputs import CellInputs, LayerStores
from chunkdist.replay import undisturbed_rng
from chunkdist.sharding.refuse_sequence import refuse_sequence_parallelism
from chunkdist.stores.attention_outputs import new_attention_outputs
from chunkdist.stores.kv_store import KVStore
from chunkdist.stores.state_relay import StateStore
from chunkdist.stream.stream import Chunk, Stream


class StageOutput(Exception):
    """Ends the forward of a model behind the stage's last layer, and carries the hidden states (1, C, H)."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class ModelStage(nn.Module):
    """Takes a model for its own: parameters of other stages are let go.

    Args:
        model: A causal LM of transformers, in which PEFT may have put its adapters.
        layers: Indices of the stage's layers, out of `cut_stages`.
    """

    def __init__(self, model: PreTrainedModel, config: ChunkConfig, layers: range) -> None:
        super().__init__()
        if not isinstance(model, PreTrainedModel):
            raise ValueError(
                f"{type(model).__name__} is not a transformers model: pass the causal LM itself, of PEFT "
                "its get_base_model()"
            )
        if HANDLE in model.__dict__:
            raise ValueError("the model is chunked already: call unchunk_model(model) first")
        entries, decoder, all_layers = find_layers(model)
        configs = configs_of(entries, decoder)
        refuse_sequence_parallelism(configs, [model])
        refuse_known(model, entries[-1], all_layers)
        if not layers or layers.start < 0 or layers.stop > len(all_layers):
            raise ValueError(
                f"layers={layers}, but the model has {len(all_layers)}: pass a part of cut_stages"
            )
        self.model = model
        self.is_first, self.is_last = layers.start == 0, layers.stop == len(all_layers)
        self.losses: list[Tensor] = []
        """Losses of the micro-batches of the step, in the order of their backwards; on the last stage."""
        self.observers: list[Callable[[TokenLosses], None]] = []
        """Called with the losses of each chunk's tokens; on the last stage."""
        self.parameters_of_step: GroupParameters
        self.witness: RerunWitness
        """Of the step's cells, by micro-batch."""
        self._written: WrittenBuffers
        self._config = config
        states = layer_states(model.config.get_text_config(), all_layers)
        self.has_state = any(state.relays for state in states)
        """Whether layers keep state other than keys and values: then sequences do not share chunks."""
        if self.has_state and config.chunk_size == 1:
            raise ValueError(
                f"chunk_size=1, but {type(model).__name__} has layers with state between tokens, which take "
                "one token as generation does: write at least 2"
            )
        additions = Additions(LayerProbe() if needs_probe(model, has_state=self.has_state) else None)
        self._context = ChunkContext(config, configs, checked=additions.asked)
        self._cell: CellInputs | None = None
        self._layers: list[GroupLayer] = []
        self._knows_arguments = self.is_first
        self._seen: list[dict[str, Any]] | None = None
        """What the stage's layers are called with, in a pass that does nothing but look at it."""
        self._sees_first = False
        """Whether such a pass ends with the first layer."""
        self._num_called = 0
        """Layers of the stage, in the running pass."""
        embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
        norms = norms_of(decoder)
        _refuse_other_parameters(model, [embeddings, head, *norms, *all_layers])
        self.is_tied = head.weight is embeddings.weight
        self.hidden_dtype: torch.dtype = embeddings.weight.dtype  # type: ignore[assignment]
        self.hidden_size: int = model.config.get_text_config().hidden_size
        for index, layer in enumerate(all_layers):
            if index in layers:
                self._take(layer, states[index], index == layers.stop - 1)
            else:
                _empty(layer)
                passed_on = partial(self._pass_on, LayerSignature(layer))
                layer.__dict__["forward"] = passed_on if index < layers.start else self._pass_by
        if not self.is_first:
            _empty(embeddings)
            embeddings.__dict__["forward"] = partial(_refuse_tokens, type(model).__name__)
        if not self.is_last:
            _empty(head)
            for module in norms:
                _empty(module)

    @property
    def layers(self) -> list[nn.Module]:
        """This stage's layers."""
        return [layer.layer for layer in self._layers]

    def new_stores(self, tokens: Chunk) -> list[LayerStores]:
        """For one dependent run."""
        return [self._new_store(tokens) for _ in self._layers]

    def _new_store(self, tokens: Chunk) -> LayerStores:
        outputs = new_attention_outputs(self._config.keeps_attention)
        return LayerStores(KVStore(tokens, self._config.kv_grad_dtype), StateStore(), outputs)

    def begin_step(self) -> None:
        self.losses = []
        self.parameters_of_step = GroupParameters([self.model])
        self.witness, self._written = RerunWitness(self.layers), WrittenBuffers(self.layers)

    def end_step(self) -> None:
        """In the step's last backward.

        Raises:
            UnsupportedModelError: reruns have come to something else, or buffers have been written to.
        """
        self.witness.refuse_others()
        self._written.refuse()

    def run_layers(self, cell: CellInputs) -> Tensor:
        """The stage's layers on a chunk; on the first stage, what comes before them as well."""
        if not self._knows_arguments:
            self._look_at_arguments(cell)
        try:
            if cell.hidden is None:
                self._call(cell, input_ids=cell.model_inputs["input_ids"])
            else:  # what the model makes of this is thrown away
                self._call(cell, inputs_embeds=torch.zeros_like(cell.hidden))
        except StageOutput as output:
            return output.hidden
        raise self._skipped()

    def run_head(self, cell: CellInputs) -> Tensor:
        """The loss of a chunk whose layers have run: what comes behind them, from `cell.result`."""
        assert cell.result is not None
        labels = cell.model_inputs["shift_labels"]
        found: list[tuple[Tensor, Tensor]] = []
        with lazy_logits(self.model, (lambda *losses: found.append(losses)) if self.observers else None):
            output = self._call(
                cell,
                inputs_embeds=torch.zeros_like(cell.result),
                labels=labels,
                shift_labels=labels,
                num_items_in_batch=cell.model_inputs["num_items"],
            )
        for by_token, has_label in found:
            losses = TokenLosses.of(by_token, has_label, cell.model_inputs)
            for observe in self.observers:
                observe(losses)
        loss: Tensor = output.loss
        return loss

    def _look_at_arguments(self, cell: CellInputs) -> None:
        """Once, before the stage's first pass: in which form layers return, and with what they are called.

        Raises where layers are given something made of the tokens beside the hidden states: no stage but the
        first has the tokens.
        """
        assert cell.hidden is not None
        with torch.no_grad(), undisturbed_rng(cell.hidden):
            self._learn_form(cell)
            found = [self._arguments(cell) for _ in range(2)]
        for first, second in zip(*found, strict=True):
            names = [name for name in first if not _equal(first[name], second[name])]
            if names:
                raise UnsupportedModelError(
                    f"{type(self.model).__name__} passes its layers {', '.join(names)}, made of the tokens: "
                    "only the first stage of a pipeline has them"
                )
        self._knows_arguments = True

    def _arguments(self, cell: CellInputs, *, of_first: bool = False) -> list[dict[str, Any]]:
        """What the stage's layers are called with, or the first one alone, where tokens are noise."""
        assert cell.hidden is not None
        self._seen, self._sees_first = [], of_first
        try:
            self._call(cell, inputs_embeds=torch.randn_like(cell.hidden))
        except StageOutput:
            return self._seen
        finally:
            self._seen = None
        raise self._skipped()

    def _learn_form(self, cell: CellInputs) -> None:
        """Runs the stage's first layer, to see whether layers return a tensor or a tuple: with what it is
        called with itself, since layers of other kinds are called with other things."""
        assert cell.hidden is not None
        layer, stream = self._layers[0], _alone(cell.chunk)
        layer.tuple_length = 0
        try:
            (arguments,) = self._arguments(cell, of_first=True)
        except UnsupportedModelError:
            raise
        except Exception as error:  # the decoder may take apart what its layers return
            layer.tuple_length = 2
            try:
                (arguments,) = self._arguments(cell, of_first=True)
            except Exception:
                raise error from None
        stores = self._new_store(stream.chunks[0])
        own = layer.cell(stream.chunks[0], stream, stores.kv, stores.states)
        with self._context.attention_installed():
            layer.run(own, cell.hidden, arguments)

    def _call(self, cell: CellInputs, **arguments: Any) -> Any:
        before, self._cell, self._num_called = self._cell, cell, 0
        try:
            with self._context.attention_installed():
                positions = cell.model_inputs["position_ids"]
                return self.model(position_ids=positions, use_cache=False, **arguments)
        finally:
            self._cell = before

    def _take(self, layer: nn.Module, state: LayerState, is_last: bool) -> None:
        for submodule in layer.modules():
            submodule.__dict__[LAYER_ATTRIBUTE] = state
        own = GroupLayer(layer, state, self._context)
        layer.__dict__["forward"] = partial(self._run, own, len(self._layers), is_last)
        self._layers.append(own)

    def _run(self, layer: GroupLayer, position: int, is_last: bool, *args: Any, **kwargs: Any) -> Any:
        """The forward of a layer of this stage."""
        cell = self._running()
        hidden, arguments = layer.signature.bind(args, kwargs)
        if position != self._num_called:
            raise self._skipped()
        self._num_called += 1
        if self._seen is not None:
            self._seen.append(arguments)
            if is_last or self._sees_first:
                raise StageOutput(hidden)
            return self._layers[0].wrap(hidden)
        refuse_arguments(layer.layer, hidden, arguments, _alone(cell.chunk))
        if cell.result is not None:
            return layer.wrap(cell.result)
        if position == 0 and cell.hidden is not None:
            hidden = cell.hidden  # some decoders scale what they get as embeddings
        stores = cell.stores[position]
        kept = stores.attention if cell.keeps_attention else None
        own = layer.cell(cell.chunk, cell.stream, stores.kv, stores.states, outputs=kept)
        call = (layer,), (arguments,), hidden, _alone(cell.chunk), cell.stream.longest_sequence
        with self._context.checked(*call):
            output = layer.run(own, hidden, arguments)
        if own is not None and own.relay is not None:
            cell.relays.append(own.relay)
        if is_last:
            raise StageOutput(output)
        return layer.wrap(output)

    def _pass_on(self, signature: LayerSignature, *args: Any, **kwargs: Any) -> Any:
        """The forward of a layer of a stage before."""
        hidden, _ = signature.bind(args, kwargs)
        if hidden.ndim < 3:  # see `_learn_form`: the first element of a tensor where a tuple was expected
            hidden = hidden[None]
        return self._layers[0].wrap(hidden)

    def _skipped(self) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{type(self.model).__name__} skips layers of the stage, or calls them in another order"
        )

    def _pass_by(self, *_: Any, **__: Any) -> Any:
        """The forward of a layer of a later stage: the stage's last one ends the pass before."""
        raise self._skipped()

    def _running(self) -> CellInputs:
        if self._cell is None:
            raise UnsupportedModelError("a layer was called by something else than its stage of the pipeline")
        return self._cell


def _refuse_tokens(name: str, *_: Any, **__: Any) -> NoReturn:
    """The forward of the embeddings on any stage but the first."""
    raise UnsupportedModelError(
        f"{name} looks at its embeddings on every stage: only the first stage of a pipeline has them"
    )


def _alone(chunk: Chunk) -> Stream:
    """A stream of as many tokens."""
    own = Chunk(0, chunk.num_tokens)
    return Stream(num_tokens=own.end, chunks=(own,), segment_starts=((0,),))


def _equal(first: Any, second: Any) -> bool:
    """Whether two arguments of a layer are equal; objects, whether they are of one type."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return torch.equal(first, second)
    if isinstance(first, (tuple, list)) and isinstance(second, (tuple, list)):
        return len(first) == len(second) and all(_equal(a, b) for a, b in zip(first, second, strict=True))
    return type(first) is type(second)


def _refuse_other_parameters(model: nn.Module, owned: list[nn.Module]) -> None:
    """A parameter that every stage has is trained on one and saved from another."""
    known = {id(p) for module in owned for p in module.parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) not in known:
            raise UnsupportedModelError(
                f"{type(model).__name__} has {name} outside of layers, embeddings, last norm and head: which "
                "stage of a pipeline owns it is not known"
            )


def _empty(module: nn.Module | None) -> None:
    """Lets the parameters go; modules and their names stay."""
    for submodule in () if module is None else module.modules():
        for name in submodule._parameters:
            submodule._parameters[name] = None
