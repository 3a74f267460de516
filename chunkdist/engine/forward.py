"""How a chunked forward of a decoder begins and ends."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from chunkdist.engine import router_logits
from chunkdist.engine.context import ChunkContext
from chunkdist.engine.hidden_states import ARGUMENT, refuse_hidden_states
from chunkdist.engine.layout import DecoderCall, ReadInside, in_stream, why_with_images
from chunkdist.engine.parts import Parts
from chunkdist.engine.sharing import sharing_rule, why_not_compared
from chunkdist.errors import UnsupportedModelError
from chunkdist.sharding.refuse_sequence import refuse_sequence_parallelism
from chunkdist.spaco.sample import ChunkSample
from chunkdist.stream.from_inputs import read_stream
from chunkdist.stream.layout import Layout
from chunkdist.stream.packed import refuse_segments, why_right_padding, why_rows
from chunkdist.stream.stream import Stream

_ROUTER_LOGITS = "output_router_logits"


@contextmanager
def running(
    context: ChunkContext,
    decoder: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    begin: Callable[..., None],
    is_innermost: bool,
) -> Iterator[DecoderCall]:
    """Inside, the decoder's layers run in chunks. Reads the stream from what the caller passed, and gives
    the call to go on with.

    Args:
        begin: Called with the tokens, and whether gradients are wanted, before `context` is read.
        is_innermost: Whether the decoder calls no other module that takes token ids, with embeddings of
            images in their places.
    """
    signature = inspect.signature(decoder.forward)
    takes_use_cache = "use_cache" in list(signature.parameters)[len(args) :]
    without_cache = {**kwargs, "use_cache": False} if takes_use_cache else kwargs
    if context.stream is not None:  # inside another module that takes token ids
        yield DecoderCall(args, without_cache)
        return
    arguments = dict(signature.bind(*args, **kwargs).arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            arguments |= arguments.pop(parameter.name, {})
    caches = [key for key in ("past_key_values", "cache_params") if arguments.get(key) is not None]
    caches += ["use_cache=True"] if arguments.get("use_cache") else []
    if caches and decoder.training and torch.is_grad_enabled():  # without a graph: `generate`
        raise ValueError(
            f"{caches[0]} was passed while training, and a chunked model makes no cache: leave it out. If "
            "it holds keys and values that PEFT trains (PrefixTuningConfig, CartridgeConfig), every layer "
            "begins with them, and no chunk does: take LoraConfig or PromptTuningConfig"
        )
    if caches:  # generation
        before, context.bypassed = context.bypassed, True
        try:
            yield DecoderCall(args, kwargs)
        finally:
            context.bypassed = before
        return
    refuse_sequence_parallelism(context.model_configs)
    if torch._C._functorch.peek_interpreter_stack() is not None:  # torch 2.13
        raise ValueError(
            "a chunked model was called inside a transform of torch.func (grad, vjp, jvp, vmap), and its "
            "layer groups are nodes of the ordinary autograd: call torch.autograd.grad or backward, "
            "with torch.func.functional_call for other weights, and loop instead of vmap"
        )
    if parametrize._cache_enabled and torch.is_grad_enabled():  # torch 2.13
        raise ValueError(
            "a chunked model was called inside torch.nn.utils.parametrize.cached, which keeps weights that "
            "were made without a graph, and the backward would not reach their parameters: call it outside"
        )
    for name in ("output_attentions", _ROUTER_LOGITS):
        asked = arguments.get(name, getattr(decoder.config, name, False))
        if asked and not (name == _ROUTER_LOGITS and router_logits.are_recorded(decoder)):
            raise ValueError(
                f"{name}=True, but a chunked forward has no such outputs of the whole sequence: write "
                f"{name}=False" + ("; in TRL, router_aux_loss_coef: 0" if name == _ROUTER_LOGITS else "")
            )
    trains = decoder.training and torch.is_grad_enabled()
    embeddings, ids = arguments.get("inputs_embeds"), arguments.get("input_ids")
    tokens = ids if embeddings is None else embeddings
    begin(tokens, trains=trains)
    if hidden_states := arguments.get(ARGUMENT, getattr(decoder.config, ARGUMENT, False)):
        context.layer_by_layer = not torch.is_grad_enabled()
        if not context.layer_by_layer:
            refuse_hidden_states(hidden_states, decoder, context.config)
    if takes_use_cache:
        kwargs = without_cache
        arguments["use_cache"] = False
    try:
        group = context.sequence_group(decoder.training)
        if isinstance(tokens, torch.Tensor):
            context.row_tokens = tokens.shape[1] * (1 if group is None else group.num_ranks)
        if group is None:
            try:
                context.stream, layout = _read(context, decoder, arguments, is_innermost=is_innermost)
            except ReadInside as error:
                context.read_inside = str(error)
                yield DecoderCall(args, kwargs)
                return
            if context.stream.longest_sequence < context.stream.num_tokens:
                refuse_segments(decoder, context.stream.longest_sequence)
            call = DecoderCall(args, kwargs)
            if layout is not None:  # in the stream there is no padding
                call, context.labels.mask = in_stream(arguments, layout, context.labels.mask), None
        else:
            context.refuse_shared_rows()
            context.parts = parts = Parts(
                group, decoder, {**arguments, **kwargs}, int(context.config.chunk_size), context.labels
            )
            context.stream = parts.stream
            call = DecoderCall((), parts.arguments, parts=parts)
        sampler = context.config.sampler
        context.sample = None if sampler is None else ChunkSample(sampler, context.stream, group)
        if trains:
            context.num_computed += len(context.stream.segment_starts) * context.stream.num_tokens
        with context.attention_installed():
            yield call
        context.labels.mask = context.labels.mask if call.mask is None else call.mask
        if context.open_call is not None:
            raise UnsupportedModelError("the decoder skips layers: write layers_per_group=1")
    finally:
        if context.open_call is not None:
            context.open_call.abandon()
        context.stream = context.open_call = context.parts = context.read_inside = None
        context.layer_by_layer = False


def _read(
    context: ChunkContext, decoder: nn.Module, arguments: dict[str, Any], *, is_innermost: bool
) -> tuple[Stream, Layout | None]:
    """As `read_stream`.

    Raises:
        ReadInside: rows have padding on the left, and some of their tokens stand for images.
    """
    images = why_with_images(arguments)
    has_ids = arguments.get("input_ids") is not None
    untold = images or (None if has_ids else "inputs_embeds do not tell which tokens are equal")
    untold = untold or why_not_compared(arguments)
    known = {"has_positions": arguments.get("position_ids") is not None}
    mask = arguments.get("attention_mask")
    if context.read_inside and mask is not None and getattr(mask, "ndim", 0) != 2:
        raise ValueError(
            f"attention_mask has left padding, and {context.read_inside}, and {type(decoder).__name__} gets "
            "another mask: set padding_side='right'"
        )

    def needs_right_padding(num_tokens: int) -> str | None:
        if images and not is_innermost:
            raise ReadInside(images)
        return images or why_right_padding(decoder, num_tokens, **known)

    return read_stream(
        arguments,
        int(context.config.chunk_size),
        cut_at_segments=context.has_state,
        why_rows=lambda num_tokens: images or why_rows(decoder, num_tokens, **known),
        why_right_padding=needs_right_padding,
        sharing=partial(sharing_rule, context.config, decoder, has_state=context.has_state, untold=untold),
        labels=context.labels,
    )
