"""PEFT's methods: those that are known are exact, the others are refused or asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import nn

from chunkdist import ChunkConfig, UnsupportedModelError, chunk_model
from chunkdist.engine import additions
from chunkdist.models.known_code import is_known_class, is_known_function, name_of
from tests.helpers.models import batch, gradients, tiny_llama

TARGETS = ["q_proj", "v_proj", "down_proj"]
Q = ["q_proj"]
EXACT: dict[str, Callable[[], Any]] = {
    "LoRA": lambda: peft.LoraConfig(target_modules=TARGETS, r=4),
    "DoRA": lambda: peft.LoraConfig(target_modules=TARGETS, r=4, use_dora=True),
    "rsLoRA, PiSSA": lambda: peft.LoraConfig(
        target_modules=TARGETS, r=4, use_rslora=True, init_lora_weights="pissa"
    ),
    "AdaLoRA": lambda: peft.AdaLoraConfig(target_modules=TARGETS, total_step=100),
    "BOFT": lambda: peft.BOFTConfig(target_modules=TARGETS, boft_block_size=4),
    "Llama-Adapter": lambda: peft.AdaptionPromptConfig(
        adapter_len=4, adapter_layers=2, task_type="CAUSAL_LM"
    ),
    "IA3": lambda: peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
    "BEFT": lambda: peft.BeftConfig(target_modules=["v_proj"]),
    "LoHa": lambda: peft.LoHaConfig(target_modules=TARGETS, r=4),
    "LoKr": lambda: peft.LoKrConfig(target_modules=TARGETS, r=4),
    "OFT": lambda: peft.OFTConfig(target_modules=TARGETS, oft_block_size=4),
    "LN tuning": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"]),
    "VeRA": lambda: peft.VeraConfig(target_modules=Q, r=4),
    "FRoD": lambda: peft.FrodConfig(target_modules=Q),
    "FourierFT": lambda: peft.FourierFTConfig(target_modules=TARGETS, n_frequency=20),
    "GLoRA": lambda: peft.GloraConfig(target_modules=TARGETS, r=4),
    "HRA": lambda: peft.HRAConfig(target_modules=TARGETS, r=4),
    "VB-LoRA": lambda: peft.VBLoRAConfig(target_modules=Q, r=4, num_vectors=16, vector_length=8, topk=2),
    "Uni-LoRA": lambda: peft.UniLoraConfig(target_modules=Q, r=4, theta_d_length=64),
    "MiSS": lambda: peft.MissConfig(target_modules=TARGETS, r=4),
    "RandLoRA": lambda: peft.RandLoraConfig(target_modules=Q, r=4),
    "SHiRA": lambda: peft.ShiraConfig(target_modules=TARGETS, r=4),
    "C3A": lambda: peft.C3AConfig(target_modules=TARGETS, block_size=16),
    "RoAd": lambda: peft.RoadConfig(target_modules=TARGETS, group_size=8),
    "WaveFT": lambda: peft.WaveFTConfig(target_modules=TARGETS, n_frequency=20),
    "OSF": lambda: peft.OSFConfig(target_modules=TARGETS, effective_rank=4),
    "DeLoRA": lambda: peft.DeloraConfig(target_modules=TARGETS, r=4),
    "GraLoRA": lambda: peft.GraloraConfig(target_modules=TARGETS, r=4, gralora_k=2),
    "HiRA": lambda: peft.HiraConfig(target_modules=TARGETS, r=4),
    "PSOFT": lambda: peft.PsoftConfig(target_modules=TARGETS, r=4),
    "PEANuT": lambda: peft.PeanutConfig(target_modules=TARGETS),
    "DEFT": lambda: peft.DeftConfig(target_modules=TARGETS),
    "super tuning": lambda: peft.SupertuningConfig(target_modules=TARGETS),
    "TinyLoRA": lambda: peft.TinyLoraConfig(target_modules=TARGETS, r=2),
}
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "Lily": (lambda: peft.LilyConfig(target_modules=TARGETS, r=4), "peft.tuners.lily"),
    "PVeRA": (lambda: peft.PveraConfig(target_modules=Q, r=4), "peft.tuners.pvera"),
    "MonteCLoRA": (
        lambda: peft.LoraConfig(target_modules=Q, r=4, monteclora_config=peft.MontecloraConfig()),
        "MontecloraSampler",
    ),
    "Shadow": (lambda: peft.ShadowConfig(task_type="CAUSAL_LM"), "gets ShadowCarrier, not hidden states"),
}
"""And what the message names."""


def adapted(config: Any, *, is_moved: bool) -> Any:
    model: Any = tiny_llama(num_layers=2, dtype=torch.float32, initializer_range=0.1)
    torch.manual_seed(1)
    model = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if is_moved and parameter.requires_grad:
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model.train()


@pytest.mark.parametrize("name", EXACT)
def test_known_methods_are_exact_and_not_asked(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(additions, "LayerProbe", None)
    expected = gradients(adapted(EXACT[name](), is_moved=True), batch())
    model = chunk_model(adapted(EXACT[name](), is_moved=True), ChunkConfig(chunk_size=7))
    found = gradients(model, batch())
    assert found.keys() == expected.keys()
    for key, x in expected.items():
        assert (found[key] - x).norm() <= 1e-4 * x.norm() + 1e-9, key


@pytest.mark.parametrize("name", EXACT)
def test_were_they_not_known_they_would_pass(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chunkdist.models.known_code._PEFT_METHODS", frozenset())
    model = chunk_model(adapted(EXACT[name](), is_moved=False), ChunkConfig(chunk_size=7))
    model(**batch())


@pytest.mark.parametrize("is_moved", [True, False])
@pytest.mark.parametrize("name", REFUSED)
def test_the_others_are_refused(name: str, is_moved: bool) -> None:
    """From their first step, in which most adapters have no effect."""
    make, words = REFUSED[name]
    with pytest.raises(UnsupportedModelError, match=words):
        chunk_model(adapted(make(), is_moved=is_moved), ChunkConfig(chunk_size=7))(**batch())


class Own(nn.Module):
    pass


def test_classes() -> None:
    layer = tiny_llama().model.layers[0]
    known = [type(module) for module in layer.modules()]
    assert all(is_known_class(kind, layer, mixes=False) for kind in known)
    unknown = [Own, nn.Conv1d, nn.GRU, nn.BatchNorm1d, nn.MultiheadAttention, nn.Softmax]
    assert not any(is_known_class(kind, layer, mixes=False) for kind in unknown)
    assert is_known_class(nn.Conv1d, layer, mixes=True)
    from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

    assert not is_known_class(Qwen3MLP, layer, mixes=False)


def test_functions() -> None:
    from functools import partial, wraps

    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    def own(*args: Any) -> None:
        pass

    class Callable_:
        def __call__(self, *args: Any) -> None:
            pass

        def method(self) -> None:
            pass

    linear = nn.Linear(2, 2)
    for function in (
        own,
        partial(own, 1),
        torch.no_grad()(own),
        wraps(linear.forward)(lambda *args: None),
        Callable_(),
        Callable_().method,
        lambda *args: None,
        torch.compiler.disable(own),
    ):
        assert not is_known_function(function), function
    assert is_known_function(linear.forward)
    assert is_known_function(partial(linear.forward))
    assert is_known_function(torch.no_grad()(linear.forward))
    assert is_known_function(add_hook_to_module(nn.Linear(2, 2), AlignDevicesHook()).forward)
    assert name_of(torch.no_grad()(own)).startswith("own (test_known_code.py, line")
