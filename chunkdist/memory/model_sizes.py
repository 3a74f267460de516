"""The sizes of a model that its memory follows from: counted once, then every schedule is arithmetic."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from chunkdist.config import AttentionName
from chunkdist.loss.cross_entropy import tile_tokens
from chunkdist.loss.lazy_logits import tiled_head
from chunkdist.memory.cell_sizes import CellSizes, Line, StreamSizes, measure_cells
from chunkdist.models.flops import num_experts, num_experts_per_token, whole_shape
from chunkdist.models.layers import causal_lm_of, find_layers

if TYPE_CHECKING:
    from chunkdist.config import ChunkConfig


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Sizes of the weights of some modules, on one rank.

    Args:
        num_numbers: Elements of all parameters, when gathered.
        num_trainable: The same of the trained ones.
        local_bytes: Bytes of all, as they lie here: a rank's shard, quantised ones packed.
        whole_bytes, whole_trainable_bytes: Bytes of all, and of the trained ones, when gathered.
        largest_bytes: Bytes of the largest matrix, when gathered and not quantised.
        factored_numbers: Rows and columns of the trained matrices, and numbers of the trained vectors.
        is_quantised: Whether matrices are packed, and unpacked one at a time.
    """

    num_numbers: int
    num_trainable: int
    local_bytes: int
    whole_bytes: int
    whole_trainable_bytes: int
    largest_bytes: int
    factored_numbers: int
    is_quantised: bool

    @classmethod
    def of(cls, parameters: Iterable[Tensor]) -> Weights:
        unique = list({id(p): p for p in parameters}.values())
        trained = [p for p in unique if p.requires_grad]
        return cls(
            num_numbers=sum(_numel(p) for p in unique),
            num_trainable=sum(_numel(p) for p in trained),
            local_bytes=sum(_local_bytes(p) for p in unique),
            whole_bytes=sum(_numel(p) * p.element_size() for p in unique if not _is_packed(p))
            + sum(_local_bytes(p) for p in unique if _is_packed(p)),
            whole_trainable_bytes=sum(_numel(p) * p.element_size() for p in trained),
            largest_bytes=max((_numel(p) * _unpacked_bytes(p) for p in unique), default=0),
            factored_numbers=sum(sum(whole_shape(p)) if p.ndim > 1 else _numel(p) for p in trained),
            is_quantised=any(_is_packed(p) for p in unique),
        )


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """All that an estimate asks about a model.

    Args:
        cells, layers: Sizes of each decoder layer's cell and weights.
        embedding, head: Parameters of these; of tied ones, all outside of the layers count as the embedding.
        embedding_is_trained: Whether the first group's input needs a gradient.
        head_width: The vocabulary.
        head_tile_tokens: `None`: the logits of all tokens are made.
        head_weight_bytes: Bytes of the head's weight while it is trained, else 0.
        element_bytes: Bytes of an element of the hidden states.
        is_counted: False: with experts, one cell's graph follows from the config's sizes, roughly.
        router_bytes: Bytes a token of the router logits of all layers, where the config asks for them, with
            what the load-balancing loss keeps of them.
    """

    cells: tuple[CellSizes, ...]
    layers: tuple[Weights, ...]
    embedding: Weights
    head: Weights
    all_weights: Weights
    stream: StreamSizes
    embedding_is_trained: bool
    head_width: int
    head_tile_tokens: int | None
    head_numbers_trained: int
    element_bytes: int
    kv_grad_bytes: int
    is_counted: bool
    router_bytes: int = 0

    @property
    def is_tied(self) -> bool:
        return not self.head.num_numbers

    @classmethod
    def of(
        cls,
        model: nn.Module,
        *,
        kv_grad_dtype: torch.dtype | None = torch.float32,
        attention: AttentionName = "auto",
        device_type: str = "cpu",
        activation_bytes: int | None = None,
        weights_dtype: torch.dtype | None = None,
    ) -> ModelSizes:
        """Looks at a model, and runs a twin of it on a few tokens. Its weights may be anywhere, or nowhere.

        Args:
            activation_bytes: 2: the run has autocast in bf16 or fp16.
            weights_dtype: As in `measure_cells`.
            device_type: `"cuda"`: as on a GPU, whatever this machine has.
        """
        causal_lm = causal_lm_of(model)
        layers = find_layers(causal_lm)[2]
        inside = {id(p) for layer in layers for p in layer.parameters()}
        outside = [p for p in model.parameters() if id(p) not in inside]
        usual = _usual_bytes(model.parameters())
        autocast = torch.bfloat16 if activation_bytes == 2 else None
        cells, stream = measure_cells(
            model,
            kv_grad_dtype=kv_grad_dtype,
            attention=attention,
            device_type=device_type,
            autocast=autocast,
            weights_dtype=weights_dtype,
        )
        element = activation_bytes or usual
        has_experts = num_experts(causal_lm.config) is not None
        if has_experts:
            cells = [_with_experts(cell, causal_lm.config, element) for cell in cells]
        head = tiled_head(causal_lm)
        embedding = causal_lm.get_input_embeddings()
        of_head = {id(p) for p in getattr(causal_lm.get_output_embeddings(), "parameters", list)()}
        of_head -= {id(p) for p in embedding.parameters()}
        text = causal_lm.config.get_text_config(decoder=True)
        widths = [cell.kv_bytes // cell.kv_numbers for cell in cells if cell.kv_numbers]
        kv_element = max(widths, default=usual)
        trained_head = head is not None and head.weight.requires_grad
        return cls(
            cells=tuple(cells),
            layers=tuple(Weights.of(layer.parameters()) for layer in layers),
            embedding=Weights.of(p for p in outside if id(p) not in of_head),
            head=Weights.of(p for p in outside if id(p) in of_head),
            all_weights=Weights.of(model.parameters()),
            stream=stream,
            embedding_is_trained=any(p.requires_grad for p in embedding.parameters()),
            head_width=text.vocab_size if causal_lm.get_output_embeddings() else causal_lm.config.num_labels,
            head_tile_tokens=None
            if head is None
            else tile_tokens(head.out_features, activation_bytes or head.weight.element_size()),
            head_numbers_trained=_numel(head.weight) if head is not None and trained_head else 0,
            element_bytes=element,
            kv_grad_bytes=kv_element if kv_grad_dtype is None else max(kv_element, kv_grad_dtype.itemsize),
            is_counted=not has_experts,
            router_bytes=_router_bytes(text, len(layers), element),
        )

    @classmethod
    def for_config(cls, model: nn.Module, config: ChunkConfig, **settings: Any) -> ModelSizes:
        """`of`, for the K/V gradients and the attention of a config."""
        return cls.of(model, kv_grad_dtype=config.kv_grad_dtype, attention=config.attention, **settings)


def quantized(sizes: ModelSizes, *, num_bits: int, double: bool = False) -> ModelSizes:
    """The sizes of a model whose layers bitsandbytes will quantise; what is trained, and what is outside of
    layers, stays.

    4 bits: blocks of 64 numbers with one fp32 scale each, or, quantised twice, one byte (arXiv 2305.14314,
    section 3); 8 bits: a scale a row, which is left out.
    """
    scale = (1 if double else 4) / 64 if num_bits == 4 else 0
    per_number = num_bits / 8 + scale
    layers = []
    for weights in sizes.layers:
        packed = (
            round((weights.num_numbers - weights.num_trainable) * per_number) + weights.whole_trainable_bytes
        )
        layers.append(replace(weights, local_bytes=packed, whole_bytes=packed, is_quantised=True))
    saved = sum(old.whole_bytes - new.whole_bytes for old, new in zip(sizes.layers, layers, strict=True))
    every = replace(
        sizes.all_weights,
        local_bytes=sizes.all_weights.local_bytes - saved,
        whole_bytes=sizes.all_weights.whole_bytes - saved,
        is_quantised=True,
    )
    return replace(sizes, layers=tuple(layers), all_weights=every)


def _with_experts(cell: CellSizes, config: Any, element: int) -> CellSizes:
    """The twin runs experts in a way of its own, since which tokens go where follows from values. What Llama
    layers have been seen to keep: 3 numbers a unit of the MLP that a token passes through, 6 of the hidden
    size, and norms in fp32."""
    text = config.get_text_config(decoder=True)
    hidden, mlp = text.hidden_size, _mlp_width(text)
    saved = (3 * mlp + 6 * hidden) * element + 4 * hidden * 4
    return replace(
        cell,
        forward=Line(per_token=4 * mlp * element),
        saved=Line(per_token=saved),
        elsewhere=Line(per_token=saved + 3 * mlp * element),
    )


def _router_bytes(text: Any, num_layers: int, element: int) -> int:
    """A layer's logits and their softmax; and, of one layer in the backward, probabilities in fp32."""
    if not getattr(text, "output_router_logits", False):
        return 0
    return (num_experts(text) or 0) * (2 * element * num_layers + 4)


def _usual_bytes(parameters: Iterable[Tensor]) -> int:
    """Bytes of an element in most of the parameters: a few are kept in fp32 in models of another dtype."""
    counts: Counter[int] = Counter()
    for parameter in parameters:
        if parameter.is_floating_point():
            counts[parameter.element_size()] += _numel(parameter)
        elif _is_packed(parameter):
            counts[_unpacked_bytes(parameter)] += _numel(parameter)
    return counts.most_common(1)[0][0] if counts else 2


def _mlp_width(text: Any) -> int:
    """Units of the MLP that one token passes through."""
    width = getattr(text, "moe_intermediate_size", None) or getattr(text, "intermediate_size", None)
    return int((num_experts_per_token(text) or 1) * (width or 4 * text.hidden_size))


def _is_packed(parameter: Tensor) -> bool:
    return hasattr(parameter, "quant_state") or parameter.dtype in (torch.int8, torch.uint8)


def _unpacked_bytes(parameter: Tensor) -> int:
    quant_state = getattr(parameter, "quant_state", None)
    if quant_state is not None:
        return int(quant_state.dtype.itemsize)
    return 2 if _is_packed(parameter) else parameter.element_size()


def _numel(parameter: Tensor) -> int:
    return whole_shape(parameter).numel()


def _local_bytes(parameter: Tensor) -> int:
    local = getattr(parameter, "ds_tensor", None)  # ZeRO-3's shard
    if local is None:
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return int(local.numel() * local.element_size()) + _scale_bytes(getattr(parameter, "quant_state", None))


def _scale_bytes(state: Any) -> int:
    """What bitsandbytes keeps beside a packed matrix: scales of blocks, perhaps quantised themselves."""
    if state is None:
        return 0
    return int(state.absmax.nbytes + state.code.nbytes) + _scale_bytes(state.state2 if state.nested else None)
