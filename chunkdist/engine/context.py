"""What the chunked parts of one model share, and how a chunked forward of its decoder begins and ends.

Holds no module, so that a copied submodule (PEFT's `modules_to_save`) does not drag the model along.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from chunkdist.attention import AttentionChoice
from chunkdist.attention.function import ATTENTION_NAME
from chunkdist.config import AUTO_FIELDS, ChunkConfig
from chunkdist.engine.additions import Additions
from chunkdist.engine.hidden_states import ARGUMENT, refuse_hidden_states
from chunkdist.errors import UnsupportedModelError
from chunkdist.sharding.sequence import refuse_sequence_parallelism
from chunkdist.spaco.sample import ChunkSample
from chunkdist.stores.host_memory import HostMemory
from chunkdist.stream.from_inputs import read_stream
from chunkdist.stream.packed import refuse_segments
from chunkdist.stream.padding import ForwardLabels
from chunkdist.stream.stream import Stream

if TYPE_CHECKING:
    from chunkdist.engine.group import GroupRun
    from chunkdist.engine.probe import LayerProbe

_OUTPUTS = ("output_attentions", "output_router_logits")


class ChunkContext:
    """State of one chunked model.

    Args:
        model_configs: The config objects that the model's attention modules read their implementation from.
        has_state: Whether layers keep state other than K/V: then chunks end where segments do.
        probe: Run on the layers before their first pass; `None`: they are known to be exact.
    """

    def __init__(
        self,
        config: ChunkConfig,
        model_configs: Sequence[PreTrainedConfig],
        *,
        has_state: bool = False,
        probe: LayerProbe | None = None,
    ) -> None:
        self.config = config.without_auto()
        self.asked = config
        """The config that was given; `config` has values in the place of `"auto"`."""
        self.has_state = has_state
        self.probe = probe
        self.additions = Additions(asks_classes=probe is None)
        self.attention = AttentionChoice(config.attention)
        self.host = HostMemory() if self.config.offload == "host" else None
        """Where group inputs, K/V and states wait for the backward."""
        self.stream: Stream | None = None
        """The tokens of the forward that runs; `None` outside of one, and in one that is not chunked."""
        self.open_run: GroupRun | None = None
        """A group of which some layers, not all, have been called."""
        self.bypassed = False
        """Layers run as they are: in a forward with a cache, and once the model is no longer chunked."""
        self.labels = ForwardLabels()
        self.layer_by_layer = False
        """Whether each layer of the forward that runs is a group of its own: what it returns is wanted."""
        self.sample: ChunkSample | None = None
        """SpaCO's sample of the forward that runs, or ran last; `None`: every chunk is backpropagated."""
        self._model_configs = model_configs
        self.reason = "" if config.has_auto else "as configured"
        """Why these values; empty while `"auto"` is not resolved."""

    def resolve(self, config: ChunkConfig, reason: str) -> None:
        """Puts what was chosen in the place of `"auto"`."""
        self.config, self.reason = config.without_auto(), reason
        if config.offload == "host" and self.host is None:
            self.host = HostMemory()

    def retained_chunks(self, stream: Stream) -> range:
        """Indices of the chunks that keep their graphs."""
        num_chunks = self.config.retained_chunks
        assert num_chunks != "auto"
        return stream.retained(num_chunks)

    @contextmanager
    def attention_installed(self) -> Iterator[None]:
        """The model's attention goes to chunkdist. Config objects may be shared with other models: only for a
        while."""
        before = [config._attn_implementation_internal for config in self._model_configs]
        try:
            for config in self._model_configs:
                config._attn_implementation_internal = ATTENTION_NAME
            yield
        finally:
            for config, name in zip(self._model_configs, before, strict=True):
                config._attn_implementation_internal = name

    @contextmanager
    def running(
        self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Iterator[dict[str, Any]]:
        """Inside, the decoder's layers run in chunks. Reads the stream from what the caller passed, and gives
        the keyword arguments to go on with."""
        if self.stream is not None:  # inside another module that takes token ids
            yield kwargs
            return
        signature = inspect.signature(decoder.forward)
        arguments = signature.bind(*args, **kwargs).arguments
        arguments = {**arguments, **arguments.get("kwargs", {})}
        caches = [key for key in ("past_key_values", "cache_params") if arguments.get(key) is not None]
        caches += ["use_cache=True"] if arguments.get("use_cache") else []
        if caches and decoder.training and torch.is_grad_enabled():  # without a graph: `generate`
            peft = caches[0] == "past_key_values"
            raise ValueError(
                f"{caches[0]} was passed while training, and a chunked model makes no cache: leave it out"
                + (
                    "; PEFT's prefix tuning and cartridges pass one: take LoRA or prompt tuning"
                    if peft
                    else ""
                )
            )
        if caches:  # generation
            before, self.bypassed = self.bypassed, True
            try:
                yield kwargs
            finally:
                self.bypassed = before
            return
        refuse_sequence_parallelism(self._model_configs)
        if torch._C._functorch.peek_interpreter_stack() is not None:  # torch 2.13
            raise ValueError(
                "a chunked model was called inside a transform of torch.func (grad, vjp, jvp, vmap), and its "
                "layer groups are nodes of the ordinary autograd: call torch.autograd.grad or backward, "
                "with torch.func.functional_call for other weights, and loop instead of vmap"
            )
        for name in _OUTPUTS:
            if arguments.get(name, getattr(decoder.config, name, False)):
                raise ValueError(
                    f"{name}=True, but a chunked forward has no such outputs of the whole sequence: write "
                    f"{name}=False"
                    + ("; in TRL, router_aux_loss_coef: 0" if name == "output_router_logits" else "")
                )
        if hidden_states := arguments.get(ARGUMENT, getattr(decoder.config, ARGUMENT, False)):
            self.layer_by_layer = not torch.is_grad_enabled()
            if not self.layer_by_layer:
                refuse_hidden_states(hidden_states, decoder, self.config)
        if not self.reason and decoder.training and torch.is_grad_enabled():
            asked = ", ".join(f'{name}="auto"' for name in AUTO_FIELDS if getattr(self.asked, name) == "auto")
            raise ValueError(
                f"{asked} is chosen in the forward of the causal LM, which did not run: it has been replaced "
                "since chunk_model (Liger's fused loss does that: write fused_linear_cross_entropy=False, "
                "the chunked loss makes no logits either), or the decoder was called alone; else write values"
            )
        if "use_cache" in signature.parameters and "use_cache" not in list(signature.parameters)[: len(args)]:
            kwargs = {**kwargs, "use_cache": False}
        try:
            self.stream = read_stream(
                arguments,
                int(self.config.chunk_size),
                cut_at_segments=self.has_state,
                labels=self.labels,
            )
            if self.stream.longest_segment < self.stream.num_tokens:
                refuse_segments(decoder, self.stream.longest_segment)
            sampler = self.config.sampler
            self.sample = None if sampler is None else ChunkSample(sampler, self.stream)
            with self.attention_installed():
                yield kwargs
            if self.open_run is not None:
                raise UnsupportedModelError("the decoder skips layers: write layers_per_group=1")
        finally:
            self.stream = self.open_run = None
            self.layer_by_layer = False
