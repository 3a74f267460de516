"""What the chunked parts of one model share.

Holds no module, so that a copied submodule (PEFT's `modules_to_save`) does not drag the model along.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

from transformers import PreTrainedConfig

from chunkdist.attention import AttentionChoice
from chunkdist.attention.function import ATTENTION_NAME
from chunkdist.config import ChunkConfig
from chunkdist.engine.parts import Parts
from chunkdist.errors import UnsupportedModelError
from chunkdist.sharding.sequence import SequenceGroup
from chunkdist.sharding.trainer_group import trainer_group
from chunkdist.spaco.sample import ChunkSample
from chunkdist.stores.host_memory import HostMemory
from chunkdist.stream.padding import ForwardLabels
from chunkdist.stream.stream import Stream


def _unchecked(*_: Any) -> AbstractContextManager[None]:
    return nullcontext()


class OpenCall(Protocol):
    """A group of which some layers, not all, have been called."""

    def abandon(self) -> None:
        """Gives back what the call has taken: its last layer will not be called."""
        ...


class ChunkContext:
    """State of one chunked model.

    Args:
        model_configs: The config objects that the model's attention modules read their implementation from.
        has_state: Whether layers keep state other than K/V: then chunks end where segments do.
        sequence: The ranks that share the tokens of each row; `None`: those of the trainer, if it has any.
        checked: What surrounds each call of layers; raises where they are not exact in chunks. Called with
            the layers, the arguments of each, their hidden states and stream, and how many tokens they would
            get without chunks.
    """

    def __init__(
        self,
        config: ChunkConfig,
        model_configs: Sequence[PreTrainedConfig],
        *,
        has_state: bool = False,
        sequence: SequenceGroup | None = None,
        checked: Callable[..., AbstractContextManager[None]] = _unchecked,
    ) -> None:
        self.config = config.without_auto()
        self.requested = config
        """The config that was given; `config` has values in the place of `"auto"`."""
        self.has_state = has_state
        self.sequence = sequence
        self.parts: Parts | None = None
        """The forward that runs, where tokens are shared between ranks."""
        self.checked = checked
        self.attention = AttentionChoice(config.attention)
        self.host = HostMemory() if self.config.offload == "host" else None
        """Where group inputs, K/V and states wait for the backward."""
        self.stream: Stream | None = None
        """The tokens of the forward that runs; `None` outside of one, and in one that is not chunked."""
        self.read_inside: str | None = None
        """Why the forward that runs reads its tokens only where embeddings of images are in their places."""
        self.row_tokens = 0
        """Tokens of each row of the forward that runs, as the caller has passed it to all ranks."""
        self.num_computed = 0
        """Tokens that the training forwards so far have computed."""
        self.open_call: OpenCall | None = None
        self.bypassed = False
        """Layers run as they are: in a forward with a cache, and once the model is no longer chunked."""
        self.labels = ForwardLabels()
        self.layer_by_layer = False
        """Whether each layer of the forward that runs is a group of its own: what it returns is wanted."""
        self.sample: ChunkSample | None = None
        """SpaCO's sample of the forward that runs, or ran last; `None`: every chunk is backpropagated."""
        self.model_configs = model_configs
        self.reason = "" if config.has_auto else "as configured"
        """Why these values; empty while `"auto"` is not resolved."""
        self.keep_reason = "" if config.keep_attention == "auto" else "as configured"
        """Why attention's outputs are kept, or not; empty while that is not decided."""
        self.keep_decided_for = math.inf if self.keep_reason else 0.0
        """Tokens of all rows for which it was decided: more ask anew."""

    def sequence_group(self, is_training: bool) -> SequenceGroup | None:
        """The ranks that share the rows of a forward that begins. Trainers share those of training only."""
        if self.sequence is None:
            return trainer_group() if is_training else None
        return None if self.sequence.in_training_only and not is_training else self.sequence

    def refuse_shared_rows(self) -> None:
        """Raises `UnsupportedModelError` where ranks cannot share the tokens of a row."""
        if self.has_state:
            raise UnsupportedModelError(
                "the model has layers with state between tokens, which ranks do not hand on to each other: "
                "train it without sequence parallelism (chunks bound the memory of a sequence)"
            )
        if self.config.share_prefixes is True:
            raise UnsupportedModelError(
                "share_prefixes=True, but ranks share the tokens of each row as they were passed: write "
                "share_prefixes=False"
            )

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
        before = [config._attn_implementation_internal for config in self.model_configs]
        try:
            for config in self.model_configs:
                config._attn_implementation_internal = ATTENTION_NAME
            yield
        finally:
            for config, name in zip(self.model_configs, before, strict=True):
                config._attn_implementation_internal = name
