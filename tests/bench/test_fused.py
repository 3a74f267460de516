"""`fused`: parts of layers run fused and gradients stay what they are; after it, nothing is left."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config
from transformers.models.llama import modeling_llama

from chunkdist import ChunkConfig, chunk_model, unchunk_model
from chunkdist.bench.fused import fused
from tests.engine.test_compile import Backend
from tests.helpers import liger_stand_in
from tests.helpers.models import batch, gradients, largest_difference, tiny_llama, with_lora

INPUTS = batch(num_tokens=20)


def tiny_qwen3() -> PreTrainedModel:
    """With norms of queries and keys."""
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "head_dim": 8,
        "num_hidden_layers": 1,
        "vocab_size": 61,
    }
    config = Qwen3Config(num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3, **sizes)
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="plain")
    return model.double().train()


MODELS: dict[str, Callable[[], Any]] = {
    "LoRA": lambda: with_lora(tiny_llama(num_layers=1)),
    "Qwen3": tiny_qwen3,
}


def state_of(model: Any) -> list[dict[str, Any]]:
    """All attributes of all modules, and the globals of Llama's code but for references to other modules,
    which the compiler leaves there."""
    names = {name: x for name, x in vars(modeling_llama).items() if not name.startswith("__import_")}
    return [*(dict(module.__dict__) for module in model.modules()), names]


def same(state: list[dict[str, Any]], before: list[dict[str, Any]]) -> bool:
    return all(
        now.keys() == then.keys() and all(now[name] is then[name] for name in then)
        for now, then in zip(state, before, strict=True)
    )


def chunked_gradients(model: Any, **settings: Any) -> dict[str, Tensor]:
    chunk_model(model, ChunkConfig(attention="math", **settings))
    found = gradients(model, INPUTS)
    unchunk_model(model)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_compiled_parts(name: str) -> None:
    """As many graphs for one chunk size as for several: the compiler keeps pace with SpaCO. A chunk of one
    token has graphs of its own; with those of norms in two ranks, they are more than torch allows unasked."""
    model, backend = MODELS[name](), Backend()
    expected, before = gradients(model, INPUTS), state_of(model)
    with (
        torch._dynamo.config.patch(fail_on_recompile_limit_hit=True),
        fused(model, "compile", backend=backend),
    ):
        found = chunked_gradients(model, chunk_size=8)
        num_graphs = backend.num_graphs
        assert num_graphs > 0
        assert largest_difference(found, expected) < 1e-12
        assert largest_difference(chunked_gradients(model, chunk_size=5), expected) < 1e-12
        assert backend.num_graphs == num_graphs
        if name == "Qwen3":
            found = chunked_gradients(model, chunk_size=19, retained_chunks=1)
            assert largest_difference(found, expected) < 1e-12
    assert same(state_of(model), before)
    num_graphs = backend.num_graphs
    again = gradients(model, INPUTS)
    assert all(torch.equal(again[key], expected[key]) for key in expected)
    assert backend.num_graphs == num_graphs


def test_ligers_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    liger_stand_in.install(monkeypatch)
    model = with_lora(tiny_llama(num_layers=2, dtype=torch.float32))
    own, before = gradients(model, INPUTS), state_of(model)
    with fused(model, "liger"):
        assert modeling_llama.apply_rotary_pos_emb is liger_stand_in.rotary
        expected = gradients(model, INPUTS)
        assert 0 < largest_difference(expected, own) < 1e-5
        for settings in ({}, {"layers_per_group": 2, "retained_chunks": 1}):
            assert largest_difference(chunked_gradients(model, chunk_size=8, **settings), expected) < 1e-5
    assert same(state_of(model), before)
    again = gradients(model, INPUTS)
    assert all(torch.equal(again[key], own[key]) for key in own)


def test_what_was_there_before_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """After an error in a step, and where parts had been compiled or patched already."""
    liger_stand_in.install(monkeypatch)
    model = tiny_llama(num_layers=2, dtype=torch.float32)
    model.model.layers[0].mlp.compile(backend="eager")
    liger_stand_in.apply_to(model, swiglu=False, fused_linear_cross_entropy=False)
    before = state_of(model)
    for kind in ("compile", "liger"):
        with suppress(KeyboardInterrupt), fused(model, kind, backend="eager"):  # type: ignore[arg-type]
            assert not same(state_of(model), before)
            raise KeyboardInterrupt
        assert same(state_of(model), before)


def test_liger_that_fails_halfway(monkeypatch: pytest.MonkeyPatch) -> None:
    liger_stand_in.install(monkeypatch)
    model = tiny_llama(num_layers=2, dtype=torch.float32)
    del model.model.layers[1].post_attention_layernorm
    before = state_of(model)
    with pytest.raises(AttributeError, match="post_attention_layernorm"), fused(model, "liger"):
        pass
    assert same(state_of(model), before)


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama(num_layers=1, dtype=torch.float32)
    with pytest.raises(ValueError, match="kind='fast': write one of compile, liger"), fused(model, "fast"):  # type: ignore[arg-type]
        pass
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "liger_kernel", None)
        with pytest.raises(RuntimeError, match="pip install liger-kernel"), fused(model, "liger"):
            pass
    liger_stand_in.install(monkeypatch)
    with (
        pytest.raises(ValueError, match="model_type='qwen3': it has them for llama"),
        fused(tiny_qwen3(), "liger"),
    ):
        pass
    with pytest.raises(ValueError, match=r"float64.*write model\.float\(\)"), fused(model.double(), "liger"):
        pass
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match="on the CPU"), fused(model.float(), "liger"):
        pass
