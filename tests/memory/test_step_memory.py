"""The memory bound of SeCO, on the real code at Llama-3-8B's geometry, by fake tensors."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, LlamaConfig

from chunkdist import ChunkConfig, chunk_model
from chunkdist.chunking import host_memory
from chunkdist.engine.group import GroupCall
from chunkdist.memory.fake_model import fake_model
from chunkdist.memory.live_bytes import LiveBytes

KIB, GIB = 1024, 2**30
CHUNK_SIZE = 2048
NUM_LAYERS = 32


def llama3_8b(num_layers: int, vocab_size: int = 128256) -> nn.Module:
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=num_layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        rope_theta=500000.0,
        max_position_embeddings=131072,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))


@lru_cache
def peak_bytes(num_layers: int, num_tokens: int, chunk_size: int = CHUNK_SIZE) -> tuple[int, tuple[int, ...]]:
    """Peak live bytes of a step over the weights, and the bytes that the graph of each rerun cell holds."""
    graphs: list[int] = []
    real_rerun = GroupCall._rerun

    def rerun(self: GroupCall, index: int, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        before = live.current_bytes
        cell = real_rerun(self, index, hidden)
        if index == len(self.stream.chunks) - 2:  # a full chunk whose K/V are there already
            graphs.append(live.current_bytes - before)
        return cell

    mode = FakeTensorMode()
    model = chunk_model(
        fake_model(lambda: llama3_8b(num_layers), mode),
        ChunkConfig(chunk_size=chunk_size, attention="varlen", keep_attention=False),
    )
    model.train()
    with mode, pytest.MonkeyPatch.context() as patch:
        patch.setattr(GroupCall, "_rerun", rerun)
        ids = torch.zeros((1, num_tokens), dtype=torch.long)
        with LiveBytes(exclude=[*model.parameters(), *model.buffers()]) as live:
            model(input_ids=ids, labels=ids).loss.backward()
            return live.peak_bytes, tuple(graphs)


@pytest.mark.slow
def test_peak_grows_by_at_most_320_kib_a_token() -> None:
    """From 16K to 128K tokens. Each layer adds the same to the peak, its input: shown on 2 and 3 layers, so
    32 follow. Large chunks: fewer cells to run."""
    short, long = 16 * KIB, 128 * KIB
    peaks = {
        (num_layers, length): peak_bytes(num_layers, length, 8 * KIB)[0]
        for num_layers in (2, 3)
        for length in (short, long)
    }
    added = {length: peaks[3, length] - peaks[2, length] for length in (short, long)}
    assert added[long] - added[short] == (long - short) * 4096 * 2, (
        "a layer adds its input in bf16, and nothing else"
    )
    growth = peaks[2, long] - peaks[2, short] + (NUM_LAYERS - 2) * (added[long] - added[short])
    assert growth / (long - short) <= 320 * KIB
    assert growth / (long - short) > 250 * KIB, "the group inputs alone are 256 KiB a token"


def test_a_cells_graph_does_not_grow_with_the_sequence() -> None:
    short, long = (set(peak_bytes(2, length)[1]) for length in (8 * KIB, 32 * KIB))
    assert short == long
    assert min(short) > 0


def step_bytes(num_layers: int, num_tokens: int, **settings: Any) -> tuple[int, int]:
    """Peak live bytes of a step over the weights, on the device and on the host. A small vocabulary: the tile
    of the loss does not grow with the sequence, and runs when less else is there (`chunkdist.bench.memory`
    has all of it)."""
    mode = FakeTensorMode()
    model = fake_model(lambda: llama3_8b(num_layers, vocab_size=1024), mode)
    chunk_model(model.train(), ChunkConfig(**{"attention": "varlen", "keep_attention": False, **settings}))
    host = host_memory(model)
    with mode:
        ids = torch.zeros((1, num_tokens), dtype=torch.long)
        with LiveBytes(exclude=[*model.parameters(), *model.buffers()], host=host) as live:
            model(input_ids=ids, labels=ids).loss.backward()
    return live.peak_bytes, 0 if host is None else host.held_bytes


@lru_cache
def weights_bytes() -> int:
    with torch.device("meta"):
        return sum(p.nbytes for p in llama3_8b(NUM_LAYERS).parameters())


def test_host_offload_fits_128k_tokens_in_23_gib() -> None:
    """A layer more adds its input on the host and nothing on the device: shown on 2 and 3 layers."""
    settings = {"chunk_size": 8 * KIB, "offload": "host"}
    (device, host), (same, twice) = (step_bytes(num, 16 * KIB, **settings) for num in (2, 3))
    assert same == device
    assert (host, twice) == (16 * KIB * 8 * KIB, 2 * 16 * KIB * 8 * KIB), "the input, in bf16"
    long, _ = step_bytes(2, 128 * KIB, **settings)
    assert weights_bytes() + long <= 23 * GIB
    assert (long - device) / (112 * KIB) <= 48 * KIB
    assert (NUM_LAYERS - 1) * host * 4 <= 16 * GIB, "65,536 tokens"


def test_128k_tokens_fit_with_attention_kept_on_the_host() -> None:
    """In 23 GiB of the device and 64 GiB of the host: output in bf16 and log-sum-exp in fp32."""
    settings = {"chunk_size": 2 * KIB, "offload": "host", "keep_attention": True}
    (device, host), (same, twice) = (step_bytes(num, 16 * KIB, **settings) for num in (2, 3))
    layer = 16 * KIB * (8 * KIB + 8 * KIB + 32 * 4)
    assert same == device
    assert (host, twice) == pytest.approx((layer, 2 * layer), rel=0.06), "in whole blocks"
    long, _ = step_bytes(2, 128 * KIB, **{**settings, "chunk_size": 8 * KIB})
    assert weights_bytes() + long <= 23 * GIB
    assert (NUM_LAYERS - 1) * layer * 8 <= 64 * GIB


def test_32k_tokens_fit_in_23_gib_without_the_host() -> None:
    settings = {"chunk_size": 4 * KIB, "layers_per_group": 2, "rebuild_kv": True}
    few, more = (step_bytes(num, 32 * KIB, **settings)[0] for num in (4, 6))
    assert more - few == 32 * KIB * 8 * KIB, "a group adds its input"
    assert weights_bytes() + few + (NUM_LAYERS - 4) // 2 * (more - few) <= 23 * GIB


if __name__ == "__main__":  # the whole model, which takes minutes: python -m tests.memory.test_step_memory
    lengths = (16 * KIB, 32 * KIB, 128 * KIB)
    peaks = {length: peak_bytes(NUM_LAYERS, length)[0] for length in lengths}
    for length, peak in peaks.items():
        print(f"{length} tokens: {peak / 2**30:.3f} GiB over the weights")
    print(f"{(peaks[lengths[-1]] - peaks[lengths[0]]) / (lengths[-1] - lengths[0]) / KIB:.1f} KiB a token")
