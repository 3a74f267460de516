"""Live bytes where sequences share a prefix: of their distinct tokens, and of rows outside the decoder."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from chunkdist import ChunkConfig, chunk_model
from chunkdist.memory import LiveBytes
from tests.helpers.models import batch, tiny_llama

PROMPT, COMPLETION, NUM_ROWS = 512, 16, 8
DISTINCT = PROMPT + NUM_ROWS * COMPLETION
HIDDEN = 32


def peak_bytes(ids: Tensor, **settings: Any) -> int:
    """Of a forward and backward of the decoder, over the weights."""
    config = ChunkConfig(chunk_size=64, attention="cpu_flash", **settings)
    model = chunk_model(tiny_llama(num_layers=8, hidden_size=HIDDEN, dtype=torch.float32), config)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()  # what is made once
    model.zero_grad(set_to_none=True)
    with LiveBytes(exclude=[*model.parameters(), ids]) as live:
        decoder: Any = model.get_decoder()
        decoder(input_ids=ids, use_cache=False).last_hidden_state.sum().backward()
    return live.peak_bytes


def completions() -> Tensor:
    ids = batch(num_rows=NUM_ROWS, num_tokens=PROMPT + COMPLETION)["input_ids"]
    ids[:, :PROMPT], ids[:, PROMPT] = ids[0, :PROMPT].clone(), torch.arange(NUM_ROWS)
    return ids


@pytest.mark.parametrize(
    "settings",
    [{"keep_attention": False}, {"layers_per_group": 4, "rebuild_kv": False, "keep_attention": True}],
    ids=str,
)
def test_live_bytes_are_those_of_the_distinct_tokens(settings: dict[str, Any]) -> None:
    """At the decoder's end hidden states come back into rows."""
    rows, one_row = completions(), batch(num_tokens=DISTINCT)["input_ids"]
    one, shared = peak_bytes(one_row, **settings), peak_bytes(rows, **settings)
    apart = peak_bytes(rows, share_prefixes=False, **settings)
    outside = NUM_ROWS * (PROMPT + COMPLETION) * HIDDEN * 4
    assert shared <= 1.05 * one + outside
    assert apart > 2 * shared
