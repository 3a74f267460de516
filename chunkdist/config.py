"""`ChunkConfig`: how a model is cut into cells. Plain values, checked when built; nothing here touches a
device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch

from chunkdist.spaco.samplers import ChunkSampler

AttentionName = Literal["auto", "math", "cpu_flash", "varlen", "flash_attn", "cudnn", "efficient"]
ATTENTION_NAMES: tuple[AttentionName, ...] = get_args(AttentionName)


@dataclass(frozen=True, kw_only=True)
class ChunkConfig:
    """The schedule of a chunked model.

    Args:
        chunk_size: Tokens of a chunk. A sequence of T tokens runs as ceil(T / chunk_size) chunks; in models
            with state other than K/V, chunks also end where sequences do, and 1 means 2. `"auto"`: what is
            fastest of what fits into free memory, determined once, before the first step.
        layers_per_group: Consecutive decoder layers that form one autograd node; `"all"` is the schedule of
            SeCO (arXiv 2505.16710), 1 keeps the least K/V. `"auto"`: as for `chunk_size`.
        retained_chunks: The last chunks of a stream, whose graphs are kept from the forward instead of being
            rebuilt in the backward (the K of ChunkFlow, arXiv 2503.02356). More is faster and takes more
            memory: no more than so many graphs exist at a time, whatever the stream holds. `"auto"`: as many
            as memory has room for, determined once, before the first step.
        sampler: Which chunks are backpropagated, and with which weights. `None`: all of them, exact
            gradients.
        kv_grad_dtype: Dtype in which the gradients of keys and values are summed over the chunks that read
            them; never narrower than the keys and values themselves. `None`: their own dtype.
        offload: Where the input of groups, K/V that are not rebuilt, and states wait for the backward:
            `"none"`: on the device; `"host"`: in host memory, but for the last group's. `"auto"`: on the host
            where they must, as for `chunk_size`.
        attention: The attention backend. `"auto"` takes the fastest that can do what the layer asks for.
        rebuild_kv: Whether K/V are rebuilt in the backward (by the layer's norm and projections) instead of
            being kept from the forward. `"auto"`: rebuilt when a group is one layer and no chunk is retained,
            kept otherwise.
        keep_attention: Whether what attention returns in the forward (output and log-sum-exp) waits for the
            backward, so that no attention kernel runs twice: gradients stay the same to the bit. `"global"`:
            that of layers without a sliding window only. `"auto"`: where it fits into free memory and is
            faster by estimate, determined before the first step; with a sampler and in a pipeline, no.
        control_variate: Whether the gradients that kept chunks leave for other chunks' keys and values reach
            the norm and the k/v projections without weights, which lowers SpaCO's variance and runs these
            parts of the layer again. `"auto"`: when a group is one layer and the sampler says
            `unbiased = True`.
        share_prefixes: Whether tokens that sequences of one forward begin with are computed once for all of
            them. `True`: any. `"auto"`: beginnings of a chunk's tokens or more, where it is exact; it is not
            with dropout, a sampler, or attention in blocks. Layers with state other than K/V share whole
            chunks.

    Raises:
        ValueError: a value is out of its range, or two values exclude each other.
    """

    chunk_size: int | Literal["auto"]
    layers_per_group: int | Literal["all", "auto"] = 1
    retained_chunks: int | Literal["auto"] = 0
    sampler: ChunkSampler | None = None
    kv_grad_dtype: torch.dtype | None = torch.float32
    offload: Literal["none", "host", "auto"] = "none"
    attention: AttentionName = "auto"
    rebuild_kv: bool | Literal["auto"] = "auto"
    keep_attention: bool | Literal["global", "auto"] = "auto"
    control_variate: bool | Literal["auto"] = "auto"
    share_prefixes: bool | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        if self.chunk_size != "auto":
            _check_count("chunk_size", self.chunk_size, minimum=1, others=" or 'auto'")
        if self.layers_per_group not in ("all", "auto"):
            _check_count("layers_per_group", self.layers_per_group, minimum=1, others=", 'all' or 'auto'")
        if self.retained_chunks != "auto":
            _check_count("retained_chunks", self.retained_chunks, minimum=0, others=" or 'auto'")
        if self.offload not in ("none", "host", "auto"):
            raise ValueError(f"offload={self.offload!r} is unknown: write 'none', 'host' or 'auto'")
        if self.attention not in ATTENTION_NAMES:
            raise ValueError(
                f"attention={self.attention!r} is unknown: write one of {', '.join(ATTENTION_NAMES)}"
            )
        dtype = self.kv_grad_dtype
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"kv_grad_dtype={dtype!r} cannot hold gradients: write torch.float32 or None")
        if self.rebuild_kv not in (True, False, "auto"):
            raise ValueError(f"rebuild_kv={self.rebuild_kv!r} is unknown: write True, False or 'auto'")
        if self.rebuild_kv is True and self.retained_chunks != 0:
            raise ValueError(
                f"rebuild_kv=True needs retained_chunks=0, not {self.retained_chunks}: graphs of retained "
                "chunks hold the K/V that they read; write rebuild_kv='auto'"
            )
        if self.keep_attention not in (True, False, "global", "auto"):
            raise ValueError(
                f"keep_attention={self.keep_attention!r} is unknown: write True, False, 'global' or 'auto'"
            )
        if self.sampler is not None and not isinstance(self.sampler, ChunkSampler):
            raise ValueError(
                f"sampler={self.sampler!r} has no method draw: write IndependentSampler(budget=8)"
            )
        if self.control_variate not in (True, False, "auto"):
            raise ValueError(
                f"control_variate={self.control_variate!r} is unknown: write True, False or 'auto'"
            )
        if self.share_prefixes not in (True, False, "auto"):
            raise ValueError(
                f"share_prefixes={self.share_prefixes!r} is unknown: write True, False or 'auto'"
            )
        if self.share_prefixes is True and self.sampler is not None:
            raise ValueError(
                f"share_prefixes=True, but sampler={self.sampler!r} weighs what later chunks leave for "
                "earlier ones along one line of chunks, not along branches: write share_prefixes='auto'"
            )
        if self.control_variate is True and (self.sampler is None or self.layers_per_group != 1):
            raise ValueError(
                f"control_variate=True needs a sampler and layers_per_group=1, not {self.sampler!r} and "
                f"{self.layers_per_group!r}: write control_variate='auto'"
            )

    @property
    def has_auto(self) -> bool:
        """Whether the planner is to choose something."""
        return any(getattr(self, name) == "auto" for name in AUTO_FIELDS)

    def without_auto(self) -> ChunkConfig:
        """What runs while the planner has not chosen: in evaluations before the first step, say."""
        found = {name: first for name, first in AUTO_FIELDS.items() if getattr(self, name) == "auto"}
        return replace(self, **found, keep_attention=self.keeps_attention)

    @property
    def uses_control_variate(self) -> bool:
        """Whether SpaCO's control variate is added, with `"auto"` resolved."""
        if self.control_variate == "auto":
            return self.layers_per_group == 1 and getattr(self.sampler, "unbiased", False)
        return self.control_variate

    @property
    def keeps_attention(self) -> bool | Literal["global"]:
        """Whose outputs of attention are kept; while `"auto"` is not resolved, none are."""
        return False if self.keep_attention == "auto" else self.keep_attention

    def keeps_attention_of(self, window: int | None, num_tokens: int) -> bool:
        """Whether attention's outputs are kept of a layer with a sliding window, or none, for a row of so
        many tokens. A window that all of them fit into is none."""
        if self.keeps_attention == "global":
            return window is None or window >= num_tokens
        return self.keeps_attention

    @property
    def rebuilds_kv(self) -> bool:
        """Whether K/V are rebuilt in the backward, with `"auto"` resolved."""
        if self.rebuild_kv == "auto":
            return self.layers_per_group == 1 and self.retained_chunks == 0
        return self.rebuild_kv


AUTO_FIELDS: dict[str, Any] = {
    "chunk_size": 2048,
    "layers_per_group": 1,
    "retained_chunks": 0,
    "offload": "none",
}
"""What takes `"auto"`, and what stands for it until the planner has chosen."""
_UNITS = {"chunk_size": "tokens", "layers_per_group": "layers, or 'all'", "retained_chunks": "chunks"}


def _check_count(name: str, value: object, *, minimum: int, others: str = "") -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(
            f"{name}={value!r} is not a count of {_UNITS[name]}: write an integer >= {minimum}{others}"
        )
