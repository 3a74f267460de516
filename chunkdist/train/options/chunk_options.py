"""Our own options of a training run: how the model is chunked.

What an option of `ChunkConfig` means is said in its docstring, and its default is set there, once.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass, field
from typing import Any

import torch

from chunkdist.config import ATTENTION_NAMES, ChunkConfig
from chunkdist.spaco.samplers import (
    ChunkSampler,
    FixedBudgetSampler,
    ImportanceSampler,
    IndependentSampler,
    RunSampler,
)

_KV_GRAD_DTYPES: dict[str, torch.dtype | None] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "model": None,
}
_SAMPLERS = {
    "independent": IndependentSampler,
    "importance": ImportanceSampler,
    "runs": RunSampler,
    "fixed": FixedBudgetSampler,
}


def _of_config(name: str, *, default: object = None, choices: tuple[str, ...] | None = None) -> Any:
    """A field whose value goes to `ChunkConfig`; help, and a default that is not given, come from there."""
    if default is None:
        default = inspect.signature(ChunkConfig).parameters[name].default
    match = re.search(
        rf"^ {{8}}{name}: (.*?)(?=^ {{8}}\w+: |^ {{4}}\w+:|\Z)", ChunkConfig.__doc__ or "", re.S | re.M
    )
    assert match, f"ChunkConfig's docstring does not tell about {name}"
    help_text = " ".join(match[1].split()).replace("`", "").replace("%", "%%")
    return option(default, help_text, choices=choices)


def option(default: object, help_text: str, choices: tuple[str, ...] | None = None) -> Any:
    return field(default=default, metadata={"help": help_text} | ({"choices": choices} if choices else {}))


@dataclass(frozen=True, kw_only=True)
class ChunkArguments:
    """How the model is chunked; `chunk_config` says it in the library's own terms."""

    chunk_method: str = option(
        "seco",
        "seco: exact gradients, chunk by chunk. spaco: unbiased ones, of a sample of the chunks. none: plain "
        "TRL, to "
        "compare with.",
        choices=("seco", "spaco", "none"),
    )
    chunk_size: str = _of_config("chunk_size", default="4096")
    layers_per_group: str = _of_config("layers_per_group", default="1")
    retained_chunks: str = _of_config("retained_chunks", default="0")
    chunk_packing: bool = option(
        False, "Join whole sequences to streams without padding, and spread them over ranks by cost."
    )
    chunk_kv_grad_dtype: str = _of_config("kv_grad_dtype", default="float32", choices=tuple(_KV_GRAD_DTYPES))
    chunk_offload: str = _of_config("offload", choices=("none", "host", "auto"))
    chunk_attention: str = _of_config("attention", choices=ATTENTION_NAMES)
    chunk_rebuild_kv: str = _of_config("rebuild_kv", choices=("auto", "true", "false"))
    chunk_share_prefixes: str = _of_config("share_prefixes", choices=("auto", "true", "false"))
    chunk_keep_attention: str = _of_config("keep_attention", choices=("auto", "true", "global", "false"))
    oom: str = option(
        "error",
        "Of a step that runs out of memory. error: ends the run, and says what would fit. shrink: the step "
        "runs again with chunks of half the size, on all ranks.",
        choices=("error", "shrink"),
    )
    spaco_sampler: str = option(
        "independent",
        "independent: every chunk with the same probability. importance: in proportion to the norm of its "
        "output gradient. runs: neighbouring chunks together. fixed: the paper's, biased.",
        choices=tuple(_SAMPLERS),
    )
    spaco_budget: int = option(8, "How many chunks of a sequence are backpropagated, on average.")
    spaco_cap: float | None = option(None, "Upper bound of the fixed sampler's factor (2 in the paper).")
    chunk_check: bool = option(
        True, "Before training, compare the gradients of a short sample with those of the unchunked model."
    )

    def chunk_config(self) -> ChunkConfig | None:
        """The library's config; `None` for `chunk_method=none`.

        Raises:
            ValueError, NotImplementedError: a value is out of range, or not built yet.
        """
        sampler = self._sampler()
        if self.chunk_method == "none":
            return None
        words: dict[str, Any] = {"true": True, "false": False}
        offload: Any = self.chunk_offload
        attention: Any = self.chunk_attention
        return ChunkConfig(
            chunk_size=_count_or_word(self.chunk_size),
            layers_per_group=_count_or_word(self.layers_per_group),
            retained_chunks=_count_or_word(self.retained_chunks),
            kv_grad_dtype=_KV_GRAD_DTYPES[self.chunk_kv_grad_dtype],
            offload=offload,
            attention=attention,
            rebuild_kv=words.get(self.chunk_rebuild_kv, self.chunk_rebuild_kv),
            share_prefixes=words.get(self.chunk_share_prefixes, self.chunk_share_prefixes),
            keep_attention=words.get(self.chunk_keep_attention, self.chunk_keep_attention),
            sampler=sampler,
        )

    def _sampler(self) -> ChunkSampler | None:
        given = {
            name: value
            for name in ("spaco_sampler", "spaco_budget", "spaco_cap")
            if (value := getattr(self, name)) != inspect.signature(ChunkArguments).parameters[name].default
        }
        if self.chunk_method != "spaco":
            if given:
                raise ValueError(
                    f"{', '.join(given)} without chunk_method=spaco would be ignored: write chunk_method: "
                    "spaco"
                )
            return None
        if self.spaco_cap is None:
            sampler: ChunkSampler = _SAMPLERS[self.spaco_sampler](budget=self.spaco_budget)
            return sampler
        if self.spaco_sampler != "fixed":
            raise ValueError(
                f"spaco_cap={self.spaco_cap} with spaco_sampler={self.spaco_sampler}: a cap makes an "
                "unbiased sampler "
                "biased; leave it out, or write spaco_sampler: fixed"
            )
        return FixedBudgetSampler(budget=self.spaco_budget, cap=self.spaco_cap)


def _count_or_word(text: str) -> Any:
    return int(text) if re.fullmatch(r"[+-]?\d+", text) else text
