"""Model FLOPs of a training step, and what a card can do at most.

The convention is that of PaLM (arXiv 2204.02311, appendix B) and nanoGPT: the FLOPs that the mathematics of a
full training step asks for, whatever the program does to get there. A weight of a matrix product costs 6 a
token (2 in the forward, 4 in the backward), attention 12 a pair of positions, layer and unit of the query's
width. Reruns (gradient checkpointing, the cells of a chunked model) count nothing, frozen weights count like
trained ones.

One deviation, which makes the figure smaller: only the pairs that attention really looks at are counted
(causal, within a segment, within a sliding window), so half of what appendix B counts for one full sequence.
At long lengths attention is most of the work, and the half that no kernel computes would be reported as
utilisation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

# Dense bf16 with fp32 accumulation, from the makers' data sheets, without sparsity. The first entry whose
# words are all in the device's name counts, so that "H100 PCIe" comes before "H100".
PEAK_BF16_FLOPS: tuple[tuple[tuple[str, ...], float], ...] = (
    (("b200",), 2250e12),
    (("gh200",), 989e12),
    (("h200", "nvl"), 835e12),
    (("h200",), 989e12),
    (("h100", "nvl"), 835e12),
    (("h100", "pcie"), 756e12),
    (("h100",), 989e12),
    (("h800", "pcie"), 756e12),
    (("h800",), 989e12),
    (("h20",), 148e12),
    (("a100",), 312e12),
    (("a800",), 312e12),
    (("l40s",), 362e12),
    (("l40",), 181e12),
    (("l4",), 121e12),
    (("rtx", "6000", "ada"), 364e12),
    (("a6000",), 155e12),
    (("a40",), 150e12),
    (("a30",), 165e12),
    (("a10g",), 70e12),
    (("a10",), 125e12),
    (("rtx", "5090"), 209e12),
    (("rtx", "4090"), 165e12),
    (("rtx", "3090"), 71e12),
)
# Words that make a name with the same number another card, or a part of one.
_OTHER_CARDS = {"laptop", "ti", "super", "d", "max", "mig"}


def peak_flops(device_name: str) -> float | None:
    """Peak dense bf16 FLOP/s of a card, by `torch.cuda.get_device_name()`; `None` where it is not known."""
    words = set(device_name.lower().replace("-", " ").split())
    if words & _OTHER_CARDS:
        return None
    for keys, peak in PEAK_BF16_FLOPS:
        if all(key in words for key in keys):
            return peak
    return None


@dataclass(frozen=True, kw_only=True)
class StepFlops:
    """What a step costs: by tokens, and by pairs of positions that attend to each other.

    Args:
        per_token: FLOPs of the matrix products with weights, forward and backward, of one token.
        per_pair: For each window (`None`: all earlier positions) the FLOPs of one pair in all layers that
            have it.
    """

    per_token: int
    per_pair: tuple[tuple[int | None, int], ...]

    @classmethod
    def of(cls, model: nn.Module) -> StepFlops:
        """From the model's parameters and its config. Reads no weight: any device and sharding will do."""
        config = _text_config(model)
        return cls(per_token=6 * num_active_parameters(model), per_pair=_per_pair(config))

    def step(self, segment_lengths: list[int]) -> int:
        """FLOPs of a step over segments (sequences that do not see each other) of these lengths."""
        tokens = sum(segment_lengths)
        pairs = sum(
            cost * sum(num_pairs(length, window) for length in segment_lengths)
            for window, cost in self.per_pair
        )
        return self.per_token * tokens + pairs

    def counts(self, position_ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """What `from_counts` wants, from positions that restart at 0 where a segment starts.

        Args:
            position_ids: Any shape.
            mask: The same shape; tokens with 0 are padding after the segment and are left out.

        Returns:
            int64, on the device of `position_ids` and without waiting for it: tokens, then pairs for each of
            `per_pair`.
        """
        seen_T = position_ids.to(torch.int64) + 1
        mask_T = torch.ones_like(seen_T) if mask is None else (mask != 0).to(torch.int64)
        pairs = [
            (seen_T if window is None else seen_T.clamp(max=window)) * mask_T for window, _ in self.per_pair
        ]
        return torch.stack([mask_T.sum(), *(pairs_T.sum() for pairs_T in pairs)])

    def from_counts(self, counts: list[int]) -> int:
        """FLOPs of a step, from sums of `counts`."""
        num_tokens, *num_pairs = counts
        costs = (cost for _, cost in self.per_pair)
        return self.per_token * num_tokens + sum(
            cost * num for cost, num in zip(costs, num_pairs, strict=True)
        )


def num_pairs(length: int, window: int | None = None) -> int:
    """Pairs (query, key) of a causal segment: a query sees itself and at most `window - 1` before it."""
    if window is None or window >= length:
        return length * (length + 1) // 2
    return window * (window + 1) // 2 + (length - window) * window


def num_active_parameters(model: nn.Module) -> int:
    """Weights that a token is multiplied with: all matrices and the head, without what embedding tables look
    up.

    Experts count by the share that a token is routed to. A tied table counts once, as the head.
    """
    config = _text_config(model)
    looked_up = {
        id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()
    }
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    looked_up -= {id(p) for p in head.parameters()} if head is not None else set()
    num_all, per_token = num_experts(config), num_experts_per_token(config)
    total = 0.0
    for name, parameter in model.named_parameters():
        shape = whole_shape(parameter)
        # PEFT keeps a frozen copy beside a module that it trains in full.
        if id(parameter) in looked_up or len(shape) < 2 or ".original_module." in name:
            continue
        share = per_token / num_all if num_all and per_token and ".experts." in f".{name}" else 1.0
        total += share * shape.numel()
    return round(total)


def num_experts(config: Any) -> int | None:
    """Routed experts of a layer; `None`: there are none."""
    return _first(
        config.get_text_config(decoder=True),
        *("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
    )


def num_experts_per_token(config: Any) -> int | None:
    """How many of them a token is routed to."""
    return _first(
        config.get_text_config(decoder=True),
        *("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_k", "top_k_experts"),
    )


def pairs_by_layer(config: Any) -> list[tuple[int | None, int] | None]:
    """By layer, its window (`None`: all earlier positions) and the FLOPs of one pair of positions; `None`:
    the layer does not attend.

    Args:
        config: The text model's config.
    """
    num_layers = config.num_hidden_layers
    num_heads = config.num_attention_heads
    if getattr(config, "qk_nope_head_dim", None):  # MLA: queries and keys are wider than values
        width = num_heads * (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim)
    else:
        width = 2 * num_heads * (getattr(config, "head_dim", None) or config.hidden_size // num_heads)
    window = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) is False:
        window = None
    types = (
        getattr(config, "layer_types", None)
        or ["sliding_attention" if window else "full_attention"] * num_layers
    )
    of_kind = {"full_attention": (None, 6 * width), "sliding_attention": (window or None, 6 * width)}
    return [of_kind.get(kind) for kind in types]


def _per_pair(config: Any) -> tuple[tuple[int | None, int], ...]:
    costs: dict[int | None, int] = {}
    for window, cost in filter(None, pairs_by_layer(config)):
        costs[window] = costs.get(window, 0) + cost
    return tuple(sorted(costs.items(), key=lambda item: item[0] is not None))


def _text_config(model: nn.Module) -> PretrainedConfig:
    config: PretrainedConfig = model.config  # type: ignore[assignment]
    return config.get_text_config(decoder=True)


def whole_shape(parameter: Tensor) -> torch.Size:
    """The shape of a whole parameter, where ZeRO-3 has taken the weights away or bitsandbytes has packed
    them."""
    quant_state = getattr(parameter, "quant_state", None)
    shape = getattr(parameter, "ds_shape", parameter.shape) if quant_state is None else quant_state.shape
    return torch.Size(shape)


def _first(config: Any, *names: str) -> int | None:
    return next(
        (value for name in names if isinstance(value := getattr(config, name, None), int) and value), None
    )
