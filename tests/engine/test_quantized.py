"""QLoRA on bitsandbytes' CPU kernels, where it is installed: chunked gradients are those of the unchunked
4-bit model, and the estimate is what is counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from chunkdist import ChunkConfig, chunk_model
from chunkdist.memory import LiveBytes
from chunkdist.memory.estimate import estimate_memory
from chunkdist.memory.model_sizes import ModelSizes, quantized
from tests.helpers.models import batch, gradients, largest_difference, tiny_llama, with_lora

pytest.importorskip("bitsandbytes")

SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}


@pytest.fixture(scope="module", params=[False, True], ids=["", "scales quantised"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bool]:
    folder = tmp_path_factory.mktemp("model")
    tiny_llama(dtype=torch.bfloat16, initializer_range=0.05, **SIZES).save_pretrained(folder)
    return folder, request.param


def in_4_bits(folder: tuple[Path, bool]) -> nn.Module:
    """With adapters."""
    path, double = folder
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model: Any = AutoModelForCausalLM.from_pretrained(
        path, quantization_config=config, device_map={"": "cpu"}
    )
    model.set_attn_implementation("plain")
    return with_lora(model.train()).float()


@pytest.mark.parametrize("settings", [{}, {"layers_per_group": 2, "offload": "host"}, {"retained_chunks": 2}])
def test_gradients_are_those_of_the_unchunked_model(
    folder: tuple[Path, bool], settings: dict[str, Any]
) -> None:
    expected = gradients(in_4_bits(folder), batch())
    chunked = chunk_model(in_4_bits(folder), ChunkConfig(chunk_size=7, attention="math", **settings))
    found = gradients(chunked, batch())
    assert len(found) == 1 + 2 * 7 * 4
    assert largest_difference(found, expected) < 1e-5


def test_the_estimate_is_what_is_counted(folder: tuple[Path, bool]) -> None:
    """Weights, and the peak of a step over them."""
    config = ChunkConfig(chunk_size=64, attention="cpu_flash", keep_attention=False)
    model = in_4_bits(folder)
    sizes = ModelSizes.for_config(model, config)
    with torch.device("meta"):
        planned: Any = with_lora(tiny_llama(dtype=torch.bfloat16, **SIZES)).float()
    expected = quantized(ModelSizes.for_config(planned, config), num_bits=4, double=folder[1])
    storages = {}
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        tensors = [parameter.data, *([] if state is None else state.as_dict(packed=False).values())]
        for x in tensors:
            if isinstance(x, torch.Tensor):
                storages[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
    counted = sum(storages.values())
    assert expected.all_weights.whole_bytes == pytest.approx(counted, rel=0.03)
    assert sizes.all_weights.local_bytes == pytest.approx(counted, rel=0.03)
    chunk_model(model, config)
    with LiveBytes(exclude=model.parameters()) as live:
        model(**batch(num_tokens=512), use_cache=False).loss.backward()
    for known in (sizes, expected):
        estimate = estimate_memory(known, config, num_tokens=512)
        assert estimate.step_bytes == pytest.approx(live.peak_bytes, rel=0.05)
