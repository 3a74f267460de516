"""`ChunkConfig` refuses what it cannot do, when it is built, and says what to write."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from chunkdist import ChunkConfig


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"chunk_size": 0}, "chunk_size=0 is not a count of tokens: write an integer >= 1 or 'auto'"),
        ({"chunk_size": -4}, "chunk_size=-4"),
        ({"chunk_size": 2.5}, "chunk_size=2.5"),
        ({"chunk_size": True}, "chunk_size=True"),
        ({"layers_per_group": 0}, "write an integer >= 1, 'all' or 'auto'"),
        ({"layers_per_group": "some"}, "layers_per_group='some'"),
        ({"retained_chunks": -1}, "retained_chunks=-1"),
        ({"attention": "flash"}, "write one of auto, math, cpu_flash, varlen, flash_attn, cudnn, efficient"),
        ({"offload": "disk"}, "offload='disk' is unknown"),
        ({"kv_grad_dtype": torch.int8}, "torch.int8 cannot hold gradients"),
        ({"kv_grad_dtype": "float32"}, "kv_grad_dtype='float32' cannot hold gradients"),
        ({"rebuild_kv": "maybe"}, "rebuild_kv='maybe'"),
        ({"rebuild_kv": True, "retained_chunks": 1}, "rebuild_kv=True needs retained_chunks=0"),
    ],
)
def test_bad_values(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        ChunkConfig(**{"chunk_size": 16, **values})


def test_what_stands_for_auto_until_the_planner_has_chosen() -> None:
    config = ChunkConfig(chunk_size="auto", layers_per_group="auto", retained_chunks="auto", offload="auto")
    assert config.has_auto
    assert config.without_auto() == ChunkConfig(chunk_size=2048, keep_attention=False)
    assert not config.without_auto().has_auto


@pytest.mark.parametrize(
    ("values", "rebuilds"),
    [
        ({}, True),
        ({"layers_per_group": 2}, False),
        ({"retained_chunks": 1}, False),
        ({"rebuild_kv": False}, False),
        ({"layers_per_group": "all", "rebuild_kv": True}, True),
    ],
)
def test_when_kv_are_rebuilt(values: dict[str, Any], rebuilds: bool) -> None:
    assert ChunkConfig(chunk_size=16, **values).rebuilds_kv is rebuilds
