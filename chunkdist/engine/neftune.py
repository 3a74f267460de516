"""NEFTune's noise (arXiv 2310.05914) in packed rows: by the length of each sequence, not of the row.

transformers' hook (5.23) scales the noise on embeddings by 1 / sqrt(tokens of the row x hidden size). In a
row of many sequences it would be weaker for each of them than alone. Rows with padding that run as one stream
keep the length that they have with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.neftune import neftune_post_forward_hook

from chunkdist.engine.context import ChunkContext
from chunkdist.engine.parts import Parts
from chunkdist.stream.layout import Layout
from chunkdist.stream.stream import Stream


@contextmanager
def noise_by_segment(
    decoder: nn.Module, context: ChunkContext | None, layout: Layout | None
) -> Iterator[None]:
    """Inside, transformers' hook on the decoder's embeddings, if it is there, scales by segments."""
    stream = None if context is None else context.stream
    find = getattr(decoder, "get_input_embeddings", None)
    parts = None if context is None else context.parts
    is_padded = layout is not None and layout.is_padded
    is_one = stream is not None and all(len(starts) == 1 for starts in stream.segment_starts)
    if stream is None or find is None or (is_one and parts is None and not is_padded):
        yield
        return
    hooks = find()._forward_hooks
    found = [key for key, hook in hooks.items() if hook is neftune_post_forward_hook]
    try:
        for key in found:
            hooks[key] = partial(_add_noise, _lengths(stream.whole or stream, layout), parts)
        yield
    finally:
        for key in found:
            if key in hooks:
                hooks[key] = neftune_post_forward_hook


def _lengths(stream: Stream, layout: Layout | None) -> list[list[int]]:
    """By row and token of the stream, the tokens of the row or sequence that it is in."""
    if layout is not None and layout.is_padded:
        return [[layout.shape[1]] * stream.num_tokens]
    return [
        [end - start for start, end in pairwise((*starts, stream.num_tokens)) for _ in range(end - start)]
        for starts in stream.segment_starts
    ]


def _add_noise(
    lengths: list[list[int]], parts: Parts | None, module: nn.Module, inputs: Any, output: Tensor
) -> Tensor:
    """As transformers' hook, with each token's own length; ranks may have parts of the tokens."""
    if not module.training:
        return output
    lengths_BT1 = torch.tensor(lengths, device=output.device)[..., None]
    if parts is not None:
        lengths_BT1 = lengths_BT1[:, parts.exchange.positions]
    alpha: Any = module.neftune_noise_alpha
    scale_BT1 = alpha / torch.sqrt(lengths_BT1 * output.shape[-1])
    noisy: Tensor = output + torch.zeros_like(output).uniform_(-1, 1) * scale_BT1.to(output.dtype)
    return noisy
