"""The formula against what the real code keeps alive, under fake tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.granitemoehybrid import GraniteMoeHybridConfig
from transformers.models.qwen3_5 import Qwen3_5TextConfig
from transformers.models.qwen3_moe import Qwen3MoeConfig

from chunkdist import ChunkConfig, chunk_model, unchunk_model
from chunkdist.attention.varlen import SCRATCH_BYTES
from chunkdist.chunking import model_sizes
from chunkdist.memory.estimate import estimate_memory
from chunkdist.memory.fake_model import fake_model
from chunkdist.memory.live_bytes import LiveBytes
from chunkdist.memory.model_sizes import ModelSizes
from tests.helpers.models import with_lora


def llama(dtype: torch.dtype, **settings: Any) -> Any:
    values = {
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 32,
        **settings,
    }
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **values), dtype=dtype)


@pytest.mark.parametrize(
    ("dtype", "settings"),
    [
        (torch.bfloat16, {"layers_per_group": 1}),
        (torch.bfloat16, {"layers_per_group": "all"}),
        (torch.bfloat16, {"retained_chunks": 2}),
        (torch.float32, {"layers_per_group": 1}),
        (torch.bfloat16, {"keep_attention": True}),
        (torch.bfloat16, {"keep_attention": True, "layers_per_group": "all", "rebuild_kv": True}),
        (torch.bfloat16, {"keep_attention": True, "retained_chunks": 1}),
        (torch.float32, {"keep_attention": True}),
    ],
)
def test_is_within_5_percent(dtype: torch.dtype, settings: dict[str, Any]) -> None:
    num_tokens = 4608
    attention = "varlen" if dtype == torch.bfloat16 else "auto"
    config = ChunkConfig(**{"chunk_size": 1536, "keep_attention": False, "attention": attention, **settings})
    mode = FakeTensorMode()
    with mode:
        model = chunk_model(fake_model(lambda: llama(dtype), mode), config)
        ids = torch.zeros(1, num_tokens, dtype=torch.long)
        with LiveBytes(exclude=[*model.parameters(), ids]) as live:
            model(input_ids=ids, labels=ids).loss.backward()
        sizes = model_sizes(model)
    estimate = estimate_memory(sizes, config, num_tokens=num_tokens)
    assert estimate.step_bytes == pytest.approx(live.peak_bytes, rel=0.05)


def qwen3_5(**settings: Any) -> Any:
    """The proportions of Qwen3.5-9B, an eighth of its width."""
    values = {
        "hidden_size": 512,
        "intermediate_size": 1536,
        "layer_types": ["linear_attention", "full_attention"],
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 128,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "vocab_size": 32,
        **settings,
    }
    model = AutoModelForCausalLM.from_config(Qwen3_5TextConfig(**values), dtype=torch.bfloat16)
    model.model.layers.requires_grad_(False)
    return model


@pytest.fixture(scope="module")
def hybrid() -> Iterator[tuple[Any, ChunkConfig, dict[int, int]]]:
    """The model, its config, and the peaks by number of tokens."""
    config = ChunkConfig(chunk_size=64, keep_attention=True)
    mode = FakeTensorMode()
    peaks = {}
    with mode:
        model = chunk_model(fake_model(qwen3_5, mode), config)
        for num_tokens in (192, 384):
            ids = torch.zeros(1, num_tokens, dtype=torch.long)
            with LiveBytes(exclude=[*model.parameters(), ids]) as live:
                model(input_ids=ids, labels=ids).loss.backward()
            for parameter in model.parameters():
                parameter.grad = None
            peaks[num_tokens] = live.peak_bytes
    return model, config, peaks


def test_states_at_the_starts_of_chunks(hybrid: tuple[Any, ChunkConfig, dict[int, int]]) -> None:
    model, config, peaks = hybrid
    sizes = model_sizes(model)
    recurrent, convolution = 4 * 128 * 128 * 4, (2 * 2 + 4) * 128 * 4 * 2
    state_bytes = [cell.state_bytes for cell in sizes.cells]
    assert state_bytes == [recurrent + convolution, 0]
    estimates = {n: estimate_memory(sizes, config, num_tokens=n) for n in peaks}
    for num_tokens, peak in peaks.items():
        assert estimates[num_tokens].step_bytes == pytest.approx(peak, rel=0.1)
    (fewer, low), (more, high) = sorted(peaks.items())
    inputs_and_grads = (
        3 * 512 * 2
    )  # docs/memory.md: n + 1 while a layer with state runs, here the first of two
    expected = inputs_and_grads + state_bytes[0] / config.chunk_size
    assert (high - low) / (more - fewer) == pytest.approx(expected, rel=0.05)


def granite() -> Any:
    """State spaces, which fill up to blocks of 256 tokens."""
    values: dict[str, Any] = {
        "hidden_size": 256,
        "intermediate_size": 512,
        "shared_intermediate_size": 512,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "num_hidden_layers": 2,
        "layer_types": ["mamba", "attention"],
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "mamba_n_heads": 8,
        "mamba_d_head": 64,
        "mamba_d_state": 64,
        "mamba_n_groups": 1,
        "vocab_size": 64,
        "pad_token_id": None,
        "use_cache": False,
    }
    return AutoModelForCausalLM.from_config(GraniteMoeHybridConfig(**values), dtype=torch.bfloat16)


def test_state_spaces() -> None:
    mode = FakeTensorMode()
    config = ChunkConfig(chunk_size=512, retained_chunks=1, attention="varlen", keep_attention=False)
    with mode:
        model = chunk_model(fake_model(granite, mode), config)
        ids = torch.zeros(1, 1536, dtype=torch.long)
        with LiveBytes(exclude=[*model.parameters(), *model.buffers(), ids]) as live:
            model(input_ids=ids, labels=ids).loss.backward()
        sizes = model_sizes(model)
    estimate = estimate_memory(sizes, config, num_tokens=1536)
    assert estimate.step_bytes == pytest.approx(live.peak_bytes, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_router_logits(dtype: torch.dtype) -> None:
    """What the load-balancing loss adds to a step, of real tensors: experts need numbers."""
    num_tokens, sizes = 4096, []
    values = {"hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 8, "num_hidden_layers": 4}
    values |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 32}
    model = AutoModelForCausalLM.from_config(
        Qwen3MoeConfig(**values, num_experts=128, num_experts_per_tok=2), dtype=dtype
    )
    config = ChunkConfig(chunk_size=128, attention="math")
    ids = torch.zeros(1, num_tokens, dtype=torch.long)
    mask = torch.ones_like(ids)
    peaks = []
    for asked in (False, True):
        model.config.output_router_logits = asked
        sizes.append(ModelSizes.for_config(model, config))
        chunk_model(model, config)
        with LiveBytes(exclude=[*model.parameters(), ids, mask]) as live:
            model(input_ids=ids, labels=ids, attention_mask=mask).loss.backward()
        peaks.append(live.peak_bytes)
        model.zero_grad(set_to_none=True)
        unchunk_model(model)
    estimates = [estimate_memory(x, config, num_tokens=num_tokens) for x in sizes]
    assert estimates[1].device["router logits"] == 128 * (2 * dtype.itemsize * 4 + 4) * num_tokens
    added = estimates[1].device["router logits"]
    assert 0.6 * added <= peaks[1] - peaks[0] <= added


def test_llama_3_8b_per_token() -> None:
    """docs/memory.md: 34 hidden states, K/V of one layer and their gradients in fp32, cosine, sine and
    position. The kernel's gradients per query head are taken in parts."""
    with torch.device("meta"):
        model = llama(
            torch.bfloat16,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            vocab_size=128256,
        )
        model = with_lora(model)
    config = ChunkConfig(chunk_size=2048)
    sizes = ModelSizes.for_config(model, config, device_type="cuda")
    estimate = estimate_memory(sizes, config, num_tokens=131072)
    assert estimate.moment == "attention"
    scratch = (SCRATCH_BYTES + SCRATCH_BYTES // 4) // 131072  # 2 of 8 kv heads at a time
    assert estimate.sequence_bytes_per_token == (34 * 8 + 4 + 8) * 1024 + scratch + 2 * 256 + 8
    assert estimate.device["weights"] == pytest.approx(2 * 8_030_261_248, rel=0.01)
