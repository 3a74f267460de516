"""Whether a forward may compute equal beginnings of its sequences once.

A shared token has one hidden state for all sequences that go on from it. So nothing may treat it otherwise in
one of them: random numbers that are drawn for each token of each row, or masks that count from elsewhere.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from transformers.integrations.neftune import neftune_post_forward_hook

from chunkdist.config import ChunkConfig
from chunkdist.stream.layout import PrefixRule
from chunkdist.stream.stream import tokens_of_chunks


def sharing_rule(
    config: ChunkConfig, decoder: nn.Module, *, has_state: bool, untold: str | None = None
) -> PrefixRule | None:
    """Which equal beginnings of sequences are computed once; `None`: nothing is shared.

    Args:
        config: Without `"auto"` for the chunk size.
        has_state: Whether layers keep state other than K/V, which is known where a chunk ends.
        untold: Why it is not known which tokens are equal, or `None`: ids tell.

    Raises:
        ValueError: `share_prefixes=True`, and it would not be exact.
    """
    if config.share_prefixes is False:
        return None
    reason = untold or _why_not(config, decoder)
    if reason is None:
        least = 1 if config.share_prefixes is True else int(config.chunk_size)
        return PrefixRule(least=least, multiple=tokens_of_chunks(int(config.chunk_size)) if has_state else 1)
    if config.share_prefixes is True:
        raise ValueError(f"share_prefixes=True, but {reason}: write share_prefixes=False")
    return None


def why_not_compared(arguments: dict[str, Any]) -> str | None:
    """Why a decoder's arguments do not tell which tokens are equal: numbers that are not whole belong to
    them. `None`: they do."""
    ids = arguments.get("input_ids")
    for name, x in arguments.items():
        is_told = name == "attention_mask" or not isinstance(x, Tensor) or not x.is_floating_point()
        if ids is not None and not is_told and x.shape[:2] == ids.shape[:2]:
            return f"{name} may differ where ids are equal"
    return None


def _why_not(config: ChunkConfig, decoder: Any) -> str | None:
    if config.sampler is not None:
        return "a sampler weighs what later chunks leave for earlier ones along one line, not along branches"
    text_config = decoder.config.get_text_config() if hasattr(decoder.config, "get_text_config") else None
    if getattr(text_config, "attention_chunk_size", None):
        return f"{type(decoder).__name__} attends in blocks, which begin anew in each segment"
    if not decoder.training:
        return None
    if _makes_noise(decoder):
        return "NEFTune adds other noise to the embeddings of each row"
    for module in decoder.modules():
        if name := _dropout_of(module):
            return f"{type(module).__name__} draws other random numbers for each row ({name})"
    return None


def _makes_noise(decoder: Any) -> bool:
    embeddings = decoder.get_input_embeddings() if hasattr(decoder, "get_input_embeddings") else None
    return embeddings is not None and neftune_post_forward_hook in embeddings._forward_hooks.values()


def _dropout_of(module: nn.Module) -> str | None:
    """The name of what says that a module in training mode drops or moves its inputs at random."""
    if not module.training:
        return None
    if isinstance(module, _DropoutNd):
        return f"p={module.p}" if module.p else None
    for name, value in vars(module).items():
        is_probability = isinstance(value, float) and value > 0
        if is_probability and ("drop" in name or "jitter" in name):
            return f"{name}={value}"
    return None
