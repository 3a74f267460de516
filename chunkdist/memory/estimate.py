"""What a chunked step needs of memory, by formula: DESIGN section 4 with the sizes of one model.

The formula knows the parts that grow (with the sequence, with the chunk, with the vocabulary) and leaves out
what a kernel or an allocator takes for itself; `LiveBytes` counts a given model exactly.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from chunkdist.config import ChunkConfig
    from chunkdist.modeling import ChunkReport

_MIXER_BYTES = 40
"""Of a token in the graph of a layer with state, for each number that passes through its convolution; by
measurement of gated delta rules as transformers' torch code computes them, in fp32."""

# States of an optimizer, in numbers of the parameter's own dtype, by the name that TrainingArguments gives
# it.
_OPTIMIZER_STATES = {"adamw_torch": 2, "adamw_torch_fused": 2, "sgd": 0}


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes on one device.

    Args:
        weights_bytes: Parameters, as they lie here: a rank's shard, quantised ones packed.
        gradients_bytes: Gradients of the trainable parameters.
        optimizer_bytes: The optimizer's states; `None` where they are not known.
        sequence_bytes_per_token: What grows with the sequence: group inputs, K/V and their gradients, states
            at the chunks' starts.
        sequence_bytes: The same for all tokens of a micro-batch.
        cell_bytes: The graph of one cell, and of the retained ones.
        head_bytes: The logits of one tile.
    """

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int | None
    sequence_bytes_per_token: int
    sequence_bytes: int
    cell_bytes: int
    head_bytes: int

    @property
    def peak_bytes(self) -> int:
        """A cell runs when the head's tile is gone."""
        step_bytes = self.sequence_bytes + max(self.cell_bytes, self.head_bytes)
        return self.weights_bytes + self.gradients_bytes + (self.optimizer_bytes or 0) + step_bytes


def estimate_memory(
    model: nn.Module,
    config: ChunkConfig,
    report: ChunkReport,
    *,
    num_tokens: int,
    num_rows: int = 1,
    activation_bytes: int | None = None,
    optimizer: str = "",
) -> MemoryEstimate:
    """Expected memory of a training step.

    Args:
        num_tokens: Of a row.
        num_rows: Of a micro-batch.
        activation_bytes: Of a number in the hidden states; `None`: as in the parameters (autocast: 2).
        optimizer: As in `TrainingArguments.optim`.
    """
    model_config: Any = model.config
    text = model_config.get_text_config(decoder=True)
    parameters = list(model.parameters())
    trainable_bytes = sum(_local_bytes(p) for p in parameters if p.requires_grad)
    element = activation_bytes or _usual_bytes(parameters)
    hidden = text.hidden_size
    kv = 2 * _kv_width(text)
    grad_element = element if config.kv_grad_dtype is None else max(element, config.kv_grad_dtype.itemsize)
    state = report.state
    num_attention_layers = report.num_layers if state is None else state.num_attention_layers
    attending = min(report.layers_per_group, num_attention_layers)  # of a group
    stored_layers = attending if report.rebuilds_kv else num_attention_layers
    kv_per_token = (
        stored_layers * kv * element
        + attending * kv * grad_element
        + min(attending, 1) * kv * element  # what the attention's backward returns for the prefix
    )
    per_token = (
        report.num_groups * hidden * element  # the groups' inputs
        + kv_per_token
        + 3 * hidden * element  # hidden states in and out, and their gradient
        + (0 if state is None else -(-state.state_bytes // report.chunk_size))
    )
    # Measured on Llama layers: 6 numbers a unit of the MLP, 8 of the hidden size, and norms that compute in
    # fp32.
    layer_per_token = (6 * _mlp_width(text) + 8 * hidden) * element + (6 * hidden if element < 4 else 0)
    chunk_tokens = min(report.chunk_size, num_tokens) * num_rows
    retained_tokens = min(report.retained_chunks * report.chunk_size, num_tokens) * num_rows
    graph_tokens = max(report.layers_per_group * chunk_tokens, report.num_layers * retained_tokens)
    cell_bytes = layer_per_token * graph_tokens
    if state is not None:
        mixer_tokens = max(
            min(report.layers_per_group, state.num_state_layers) * chunk_tokens,
            state.num_state_layers * retained_tokens,
        )
        mixer_bytes = _MIXER_BYTES * state.convolved_width * mixer_tokens
        if (
            report.rebuilds_kv
            and report.layers_per_group == 1
            and state.num_attention_layers < report.num_layers
        ):
            mixer_bytes -= kv_per_token * num_tokens * num_rows  # there are none while such a layer runs
        cell_bytes += max(0, mixer_bytes)
    head_tokens = num_tokens * num_rows
    if report.head_tile_tokens is not None:
        head_tokens = min(report.head_tile_tokens, head_tokens)
    states = _OPTIMIZER_STATES.get(optimizer)
    return MemoryEstimate(
        weights_bytes=sum(_local_bytes(p) for p in parameters),
        gradients_bytes=trainable_bytes,
        optimizer_bytes=None if states is None else states * trainable_bytes,
        sequence_bytes_per_token=per_token,
        sequence_bytes=per_token * num_tokens * num_rows,
        cell_bytes=cell_bytes,
        head_bytes=2 * head_tokens * text.vocab_size * (element + 4),
    )


def _usual_bytes(parameters: list[nn.Parameter]) -> int:
    """Of a number, in most of the parameters: a few are kept in fp32 in models of another dtype."""
    counts: Counter[int] = Counter()
    for parameter in parameters:
        if parameter.is_floating_point():
            counts[parameter.element_size()] += _local_bytes(parameter)
    return counts.most_common(1)[0][0] if counts else 2


def _kv_width(text: Any) -> int:
    if getattr(text, "qk_nope_head_dim", None):  # MLA: K as wide as Q, V padded to it at most
        return int(text.num_attention_heads * (text.qk_nope_head_dim + text.qk_rope_head_dim))
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int((getattr(text, "num_key_value_heads", None) or text.num_attention_heads) * head_dim)


def _mlp_width(text: Any) -> int:
    """Units of the MLP that one token passes through."""
    per_token = getattr(text, "num_experts_per_tok", None)
    if per_token:
        return int(per_token * (getattr(text, "moe_intermediate_size", None) or text.intermediate_size))
    return int(
        getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * text.hidden_size
    )


def _local_bytes(parameter: Tensor) -> int:
    local = getattr(parameter, "ds_tensor", None)  # ZeRO-3's shard
    if local is None:
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return int(local.numel() * local.element_size())
