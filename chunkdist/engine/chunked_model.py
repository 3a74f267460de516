"""A chunked model: finds a causal LM's decoder layers, forms groups, and puts the chunked forward in their
place.

No code for any particular model: layers are the elements of the decoder's one list of layers, their attention
is whatever calls transformers' `AttentionInterface`. What cannot be computed exactly is refused.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from chunkdist.attention.cell import LAYER_ATTRIBUTE
from chunkdist.attention.function import ATTENTION_NAME, attend
from chunkdist.attention.mask import chunk_mask
from chunkdist.config import AUTO_FIELDS, ChunkConfig
from chunkdist.engine.additions import Additions
from chunkdist.engine.as_run import refuse_offset_adapters
from chunkdist.engine.context import ChunkContext
from chunkdist.engine.forward import running
from chunkdist.engine.group import LayerGroup
from chunkdist.engine.layer import CopiedNotPickled, GroupLayer
from chunkdist.engine.method import method_like
from chunkdist.engine.neftune import noise_by_segment
from chunkdist.engine.probe import LayerProbe, needs_probe
from chunkdist.loss.fused_head import FusedHead
from chunkdist.loss.lazy_logits import lazy_logits, tiled_head, untiled_reason
from chunkdist.loss.token_losses import TokenLosses
from chunkdist.models.known_code import is_known_class
from chunkdist.models.layers import configs_of, find_layers, layer_states, norms_of, refuse_known
from chunkdist.models.peft_casts import leave_out_casts, put_back_casts
from chunkdist.sharding.refuse_sequence import refuse_sequence_parallelism
from chunkdist.sharding.sequence import SequenceGroup
from chunkdist.sharding.zero3 import Zero3Layers
from chunkdist.stream.positions import positions_in_sequences

logger = logging.getLogger(__name__)

HANDLE = "_chunkdist_model"
"""Where a causal LM and its decoder hold their `ChunkedModel`."""
_ORIGINAL_FORWARD = "_chunkdist_original_forward"

AttentionInterface.register(ATTENTION_NAME, attend)
AttentionMaskInterface.register(ATTENTION_NAME, chunk_mask)


class ChunkedModel(CopiedNotPickled):
    """Everything that `chunk_model` puts into a model.

    Args:
        choose: Called before the decoder's training forward with the model, and the number of its rows,
            tokens, and bytes of an activation under autocast (else `None`): puts values in the place of
            `"auto"`.
        sequence: The ranks that share the tokens of each row.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: ChunkConfig,
        choose: Callable[..., None] | None = None,
        sequence: SequenceGroup | None = None,
    ) -> None:
        entries, decoder, layers = find_layers(model)
        configs = configs_of(entries, decoder)
        # a mesh may have a dim for ranks that share rows
        sharded = [] if sequence is not None else [model]
        refuse_sequence_parallelism(configs, sharded)
        refuse_known(model, entries[-1], layers)
        refuse_offset_adapters([module for layer in layers for module in layer.modules()])
        num_layers = len(layers)
        height = self._height(config.without_auto().layers_per_group, num_layers)
        self.model = model
        self.choose = choose
        self.sizes: dict[object, Any] = {}
        """What has been counted of the model for estimates, by the settings it was counted with."""
        self.observers: list[Callable[[TokenLosses], None]] = []
        """Called with the losses of each forward with labels."""
        self.entries = entries
        self._may_checkpoint = [*entries, *decoder.modules()]
        self._checkpointed: list[Any] = []
        """Modules whose gradient checkpointing was switched off."""
        self._states = layer_states(model.config.get_text_config(), layers)
        relays = any(state.relays for state in self._states)
        if relays and config.sampler is not None:
            raise ValueError(
                f"sampler={config.sampler!r}, but {type(model).__name__} has layers with state between "
                "tokens: a dropped chunk cuts the chain of states, and weights for it grow with every "
                "chunk; write sampler=None"
            )
        self.additions = Additions(LayerProbe() if needs_probe(model, has_state=relays) else None)
        self.context = ChunkContext(
            config, configs, has_state=relays, sequence=sequence, checked=self.additions.asked
        )
        if sequence is not None:
            self.context.refuse_shared_rows()
            _refuse_auto(config)
        self._zero3 = Zero3Layers(layers)
        self._without_casts = [module for layer in layers for module in leave_out_casts(layer)]
        self.groups: list[LayerGroup] = []
        self._forwards: list[tuple[nn.Module, Any, Any]] = []
        for start in range(0, num_layers, height):
            self.groups.append(self._group(layers[start : start + height], start))
        self._number_groups()
        if model.get_output_embeddings() is not None and tiled_head(model) is None:
            logger.warning(
                "chunkdist: the logits of the whole sequence will be made: %s", untiled_reason(model)
            )
        for module in norms_of(decoder):
            is_own = type(module).__module__ == type(decoder).__module__
            if is_own or is_known_class(type(module), layers[0], mixes=False):
                self._group([module], None)
        for entry in entries:
            entry.__dict__[HANDLE] = self
            self._replace_forward(entry, _method(_decoder_forward, entry))
        self._replace_forward(model, _method(_causal_lm_forward, model))
        model.__dict__[HANDLE] = self

    @property
    def layers(self) -> list[GroupLayer]:
        """The decoder's layers, as they stand in their groups."""
        return [layer for group in self.groups for layer in group.layers]

    def remove(self) -> None:
        """Puts the forwards back; where others have wrapped ours, ours only passes on from now."""
        self.context.bypassed = True
        self.model.__dict__.pop(HANDLE, None)
        if self.context.host is not None:
            self.context.host.close()
        self._zero3.remove()
        put_back_casts(self._without_casts)
        for entry in self.entries:
            entry.__dict__.pop(HANDLE)
        for module in self._checkpointed:
            module.gradient_checkpointing = True
        for module, forward, before in self._forwards:
            if module.__dict__.get("forward") != forward:
                continue
            module.__dict__.pop(_ORIGINAL_FORWARD, None)
            del module.__dict__["forward"]
            if before is not None:
                module.__dict__["forward"] = before
        for group in self.groups:
            for layer in group.layers:
                for module in layer.layer.modules():
                    module.__dict__.pop(LAYER_ATTRIBUTE, None)

    def begin(self, tokens: Any, *, trains: bool) -> None:
        """A chunked forward of the decoder begins, with `tokens` as ids (B, T) or embeddings (B, T, H)."""
        found: list[Any] = [m for m in self._may_checkpoint if getattr(m, "gradient_checkpointing", False)]
        if found and not self._checkpointed:
            logger.warning(
                "chunkdist: gradient checkpointing is switched off in the decoder: a chunked step is its own"
            )
        for module in found:
            module.gradient_checkpointing = False
            self._checkpointed.append(module)
        if trains and self.choose is not None and isinstance(tokens, Tensor):
            mixed = 2 if torch.is_autocast_enabled(tokens.device.type) else None
            num_rows, num_tokens = tokens.shape[:2]
            self.choose(self.model, num_tokens=num_tokens, num_rows=num_rows, activation_bytes=mixed)
        self._zero3.join([layer.layer for layer in group.layers] for group in self.groups)

    def tell(self, found: list[tuple[Tensor, Tensor]], outputs: Any, arguments: dict[str, Any]) -> None:
        """Tells observers of a forward that has ended.

        Args:
            found: Losses and labels' places, as `lazy_logits` notes them; empty: they are in the outputs, or
                nowhere.
        """
        group = self.context.sequence_group(self.model.training)
        if group is not None:
            arguments = _with_positions(group, arguments)
        losses = TokenLosses.of_outputs(outputs, arguments)
        for by_token, has_label in found:
            losses = TokenLosses.of(by_token, has_label, arguments)
        if losses is not None:
            for observe in self.observers:
                observe(losses)

    def regroup(self, layers_per_group: Any) -> None:
        """Other groups of the same layers."""
        layers = self.layers
        height = self._height(layers_per_group, len(layers))
        if height == max(len(group.layers) for group in self.groups):
            return
        starts = range(0, len(layers), height)
        self.groups = [LayerGroup(layers[start : start + height], self.context) for start in starts]
        self._number_groups()

    def _number_groups(self) -> None:
        for num_above, group in enumerate(reversed(self.groups)):
            group.num_above, group.is_last = num_above, num_above == 0

    @staticmethod
    def _height(layers_per_group: int | str, num_layers: int) -> int:
        height = num_layers if layers_per_group == "all" else int(layers_per_group)
        if height > num_layers:
            raise ValueError(f"layers_per_group={height}, but the model has {num_layers} layers: write 'all'")
        return height

    def _group(self, modules: list[nn.Module], first_index: int | None) -> LayerGroup:
        """A group of decoder layers, or, without an index, of modules that treat each token alone."""
        layers = []
        for offset, module in enumerate(modules):
            state = None
            if first_index is not None:
                state = self._states[first_index + offset]
                for submodule in module.modules():
                    submodule.__dict__[LAYER_ATTRIBUTE] = state
            layer = GroupLayer(module, state, self.context)
            self._replace_forward(module, layer.forward)
            layers.append(layer)
        return LayerGroup(layers, self.context)

    def _replace_forward(self, module: nn.Module, forward: Any) -> None:
        self._forwards.append((module, forward, module.__dict__.get("forward")))
        module.__dict__["forward"] = forward


def _causal_lm_forward(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A causal LM's forward; with labels, without ever making the logits of the whole sequence."""
    handle, forward = model.__dict__.get(HANDLE), model.__dict__[_ORIGINAL_FORWARD]
    if handle is None:
        return forward(*args, **kwargs)
    names = list(inspect.signature(model.forward).parameters) if len(args) > 1 else ["input_ids"]
    if handle.context.stream is None:
        kwargs = _shifted_labels(handle.context, model, names, args, kwargs)
    with handle.context.labels.noted(names, args, kwargs):
        if kwargs.get("labels") is None:
            return forward(*args, **kwargs)
        found: list[tuple[Tensor, Tensor]] = []
        note = (lambda *losses: found.append(losses)) if handle.observers else None
        if kwargs.get("fused_lm_head") and (fused := FusedHead.of(forward, handle.model, kwargs)) is not None:
            outputs = fused(*args, **kwargs)
        else:
            with lazy_logits(handle.model, note):
                outputs = forward(*args, **kwargs)
    if handle.observers:
        handle.tell(found, outputs, {**dict(zip(names, args, strict=False)), **kwargs})
    return outputs


def _refuse_auto(config: ChunkConfig) -> None:
    for name, instead in AUTO_FIELDS.items():
        if getattr(config, name) == "auto":
            raise ValueError(
                f"{name}='auto' with a sequence group, whose ranks might choose differently: write a value, "
                f"such as {name}={instead!r}"
            )


def _shifted_labels(
    context: ChunkContext, model: nn.Module, names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """The forward's keyword arguments. Where ranks share rows, a part's last label is the next rank's."""
    group = context.sequence_group(model.training)
    labels = {**dict(zip(names, args, strict=False)), **kwargs}.get("labels")
    if group is None or not isinstance(labels, Tensor) or kwargs.get("shift_labels") is not None:
        return kwargs
    return {**kwargs, "shift_labels": group.shifted(labels, kwargs.get("ignore_index", -100))}


def _with_positions(group: SequenceGroup, arguments: dict[str, Any]) -> dict[str, Any]:
    """A forward's arguments, with the positions of this rank's part of the rows in place of their mask."""
    mask, labels = arguments.get("attention_mask"), arguments["labels"]
    if mask is None and arguments.get("position_ids") is not None:
        return arguments
    num_rows, num_own = labels.shape
    whole = {} if mask is None else {"attention_mask": group.gather((mask != 0).to(torch.int64))}
    positions, _ = positions_in_sequences(whole, (num_rows, num_own * group.num_ranks), labels.device)
    own = positions[:, group.rank * num_own : (group.rank + 1) * num_own]
    return {**arguments, "attention_mask": None, "position_ids": own}


def _decoder_forward(decoder: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A decoder's forward, in chunks unless it uses a cache."""
    handle = decoder.__dict__.get(HANDLE)
    if handle is None:
        return decoder.__dict__[_ORIGINAL_FORWARD](*args, **kwargs)
    context, is_innermost = handle.context, decoder is handle.entries[-1]
    with (
        running(context, decoder, args, kwargs, begin=handle.begin, is_innermost=is_innermost) as call,
        noise_by_segment(decoder, context, call.layout),
    ):
        output = call.finish(decoder.__dict__[_ORIGINAL_FORWARD](*call.args, **call.kwargs))
    if context.stream is None:
        context.labels.watch(output)
    return output


def _method(forward: Callable[..., Any], module: nn.Module) -> MethodType:
    """`forward` as a method with `module`'s signature, which trainers read; torch.compile leaves it alone."""
    module.__dict__[_ORIGINAL_FORWARD] = module.forward
    return method_like(module.forward, torch.compiler.disable(partial(forward)), module)
