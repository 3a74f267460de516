"""How large the state is that layers hand on: from a twin of the model, without storage, on a few tokens."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from chunkdist.config import ChunkConfig
from chunkdist.memory.fake import fake_model, without_triton_kernels
from chunkdist.replay import undisturbed_rng

_NUM_TOKENS, _CHUNK_SIZE = 8, 4


@dataclass(frozen=True, kw_only=True)
class StateSizes:
    """Of one row.

    Args:
        num_attention_layers: Layers that have keys and values.
        num_state_layers: Layers that have state; one may have both.
        state_bytes: State at one chunk's start, of all layers together.
        convolved_width: Numbers of a token that pass through the convolutions of a layer, of the widest one.
    """

    num_attention_layers: int
    num_state_layers: int
    state_bytes: int
    convolved_width: int


def state_sizes(model: PreTrainedModel) -> StateSizes:
    """The sizes for a model that can be chunked. Takes about a second.

    Its own weights are not touched, and may be sharded; hidden states have the dtype of its embeddings.
    """
    from chunkdist.modeling import chunk_model, layers_of

    model_class: Any = next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))
    dtype = model.get_input_embeddings().weight.dtype
    config = copy.deepcopy(model.config)
    for part in (config, config.get_text_config()):
        part._experts_implementation = "batched_mm"  # the others look at values, which the twin does not have
    with unset_fake_temporarily():
        mode = FakeTensorMode()
        twin: PreTrainedModel = fake_model(lambda: model_class(config).to(dtype).eval(), mode)
    with (
        unset_fake_temporarily(),
        undisturbed_rng(torch.empty(0)),
        mode,
        torch.no_grad(),
        without_triton_kernels(),
    ):
        chunk_model(twin, ChunkConfig(chunk_size=_CHUNK_SIZE, attention="math"))
        twin.get_decoder()(input_ids=torch.zeros(1, _NUM_TOKENS, dtype=torch.long))
    layers = layers_of(twin)
    shapes = [layer.state_shapes for layer in layers]
    return StateSizes(
        num_attention_layers=sum(layer.attends for layer in layers),
        num_state_layers=sum(bool(of_layer) for of_layer in shapes),
        state_bytes=sum(
            shape.numel() * dtype.itemsize for of_layer in shapes for shape, dtype in of_layer.values()
        ),
        convolved_width=max(
            sum(shape[:-1].numel() for key, (shape, _) in of_layer.items() if key[0] == "conv")
            for of_layer in shapes
        ),
    )
