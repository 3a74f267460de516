"""Liger's kernels in a chunked model: exact before and after `chunk_model`, with its loss and without, and
counted in the estimate of memory."""

from __future__ import annotations

import importlib.util
import sys
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from chunkdist import ChunkConfig, IndependentSampler, chunk_model, unchunk_model
from chunkdist.check.gradients import check_gradients
from chunkdist.chunking import chunk_report
from chunkdist.loss.token_metrics import token_figures
from tests.helpers import liger_stand_in as liger
from tests.helpers.models import batch, gradients, largest_difference, tiny_llama, with_lora

NUM_TOKENS = 20
CONFIGS: dict[str, dict[str, Any]] = {
    "K/V rebuilt": {},
    "K/V kept": {"rebuild_kv": False},
    "groups of 2, a retained chunk": {"layers_per_group": 2, "retained_chunks": 1},
}


@pytest.fixture(autouse=True)
def _globals(monkeypatch: pytest.MonkeyPatch) -> None:
    liger.keep_globals(monkeypatch)


def config_of(**settings: Any) -> ChunkConfig:
    return ChunkConfig(chunk_size=8, attention="math", **settings)


def model_with(*, lora: bool = False) -> tuple[Any, Any]:
    """A model, and the causal LM in it."""
    causal_lm = tiny_llama(num_layers=2)
    return (with_lora(causal_lm), causal_lm) if lora else (causal_lm, causal_lm)


@pytest.mark.parametrize("is_before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
@pytest.mark.parametrize("name", CONFIGS)
def test_kernels_that_write_in_place(name: str, lora: bool, is_before: bool) -> None:
    inputs = batch(num_tokens=NUM_TOKENS)
    model, causal_lm = model_with(lora=lora)
    liger.apply_to(causal_lm, fused_linear_cross_entropy=False)
    expected = gradients(model, inputs)
    model, causal_lm = model_with(lora=lora)
    steps = [
        lambda: liger.apply_to(causal_lm, fused_linear_cross_entropy=False),
        lambda: chunk_model(model, config_of(**CONFIGS[name])),
    ]
    for step in steps if is_before else reversed(steps):
        step()
    assert largest_difference(gradients(model, inputs), expected) < 1e-12
    unchunk_model(model)
    assert largest_difference(gradients(model, inputs), expected) < 1e-12
    assert causal_lm.model.layers[0].mlp.forward.__func__ is liger.mlp_forward
    assert causal_lm.model.norm.forward.__func__ is liger.norm_forward


def test_what_spaco_leaves_in_the_stores_is_not_written_over() -> None:
    """The rotary embedding's backward turns the gradient of K where it lies, in the layer's store."""

    def grads(*, apply: bool) -> dict[str, Tensor]:
        model, _ = model_with()
        if apply:
            liger.apply_to(model, fused_linear_cross_entropy=False, rms_norm=False)
        chunk_model(model, config_of(sampler=IndependentSampler(budget=4), control_variate=True))
        torch.manual_seed(3)
        return gradients(model, batch(num_tokens=40))

    expected = grads(apply=False)  # first: the function of all Llamas is replaced
    assert largest_difference(grads(apply=True), expected) < 1e-12


@pytest.mark.parametrize("is_before", [True, False], ids=["before", "after"])
def test_its_fused_loss(is_before: bool) -> None:
    inputs = batch(num_tokens=NUM_TOKENS)
    expected = gradients(tiny_llama(num_layers=2), inputs)
    model, _ = model_with()
    kernels = {"rope": False, "rms_norm": False, "swiglu": False}
    if is_before:
        liger.apply_to(model, **kernels)
    chunk_model(model, config_of())
    if not is_before:
        liger.apply_to(model, **kernels)
    assert largest_difference(gradients(model, inputs), expected) < 1e-12
    unchunk_model(model)
    assert model.forward.__func__ is liger.lce_forward
    assert largest_difference(gradients(model, inputs), expected) < 1e-12


def test_auto_is_resolved_under_its_fused_loss() -> None:
    """Which goes past the causal LM's forward."""
    model, _ = model_with()
    chunk_model(model, ChunkConfig(chunk_size="auto"))
    liger.apply_to(model)
    model(**batch()).loss.backward()
    assert isinstance(chunk_report(model).config.chunk_size, int)


def test_what_the_trainer_adds_to_evaluations() -> None:
    """transformers passes `skip_logits` with `use_liger_kernel`, whatever the forward does with it."""
    model, _ = model_with()
    inputs = batch(num_tokens=NUM_TOKENS)
    expected = model(**inputs).loss.detach()
    chunk_model(model.eval(), config_of())
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs, skip_logits=True).loss, expected)


def test_figures_beside_its_cross_entropy() -> None:
    """It writes its gradient over the logits, of which entropy and accuracy are counted."""
    inputs = batch(num_tokens=NUM_TOKENS)
    found = []
    for apply in (False, True):
        model, _ = model_with()
        chunk_model(model, config_of())
        if apply:
            kernels = {"rope": False, "rms_norm": False, "swiglu": False, "fused_linear_cross_entropy": False}
            liger.apply_to(model, cross_entropy=True, **kernels)
        with token_figures() as figures:
            found.append((gradients(model.float(), inputs), figures))
    (expected, own), (grads, its) = found
    assert all(torch.equal(grads[key], expected[key]) for key in expected)
    torch.testing.assert_close(its.entropy, own.entropy)
    torch.testing.assert_close(its.num_correct, own.num_correct)


def test_gradients_are_checked_without_the_dtype_that_kernels_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    backward = liger.RMSNorm.backward

    def looked_up(ctx: Any, grad: Tensor) -> Any:
        {torch.float32: "fp32"}[grad.dtype]  # Liger's `torch_to_triton_dtype`
        return backward(ctx, grad)

    monkeypatch.setattr(liger.RMSNorm, "backward", staticmethod(looked_up))
    model = tiny_llama(num_layers=2, dtype=torch.float32)
    liger.apply_to(model, fused_linear_cross_entropy=False)
    result = check_gradients(model, batch(), config_of())
    assert result.passed
    assert result.notes[0] == "no step in a wider dtype: the model's kernels do not take float64"


class Kernel:
    """A kernel in Triton's style: launched by `kernel[grid](...)`, it needs memory to be there."""

    num_launches = 0

    def __getitem__(self, grid: Any) -> Any:
        def launch(x: Tensor, out: Tensor) -> None:
            if isinstance(out, FakeTensor):
                raise RuntimeError("Cannot access data pointer of Tensor (e.g. FakeTensor)")
            Kernel.num_launches += 1
            out.copy_(x)

        return launch


def kernel_forward(self: Any, x: Tensor) -> Tensor:
    self.on_fake_tensors.append(isinstance(x, FakeTensor))
    out = torch.empty_like(x)
    Kernel()[(1,)](x.detach(), out)
    return self.down_proj(self.up_proj(x) * self.gate_proj(out))  # type: ignore[no-any-return]


def test_auto_with_kernels_of_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """The estimate runs layers on tensors without storage, on which a kernel would crash. It runs them as
    they are: with the methods that Liger has put on them."""
    monkeypatch.setitem(sys.modules, "triton.runtime.jit", SimpleNamespace(KernelInterface=Kernel))
    model = tiny_llama(num_layers=1)
    liger.apply_to(model, rope=False)  # its fused loss: `chunk_model` wraps a forward that is there before
    mlp = model.model.layers[0].mlp
    mlp.on_fake_tensors = []
    mlp.forward = MethodType(kernel_forward, mlp)
    chunk_model(model, ChunkConfig(chunk_size="auto"))
    gradients(model, batch())
    assert chunk_report(model).reason.startswith("auto: ")
    assert set(mlp.on_fake_tensors) == {True, False}
    # A copy that is asked on its own notes its calls elsewhere. On fake tensors a launch raises.
    assert 0 < mlp.on_fake_tensors.count(False) <= Kernel.num_launches
    Kernel()[(1,)](torch.ones(2), torch.ones(2))
    with FakeTensorMode(), pytest.raises(RuntimeError, match="data pointer"):
        Kernel()[(1,)](torch.ones(2), torch.ones(2))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="needs liger-kernel")
@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_kernels_themselves(name: str, lora: bool) -> None:
    from liger_kernel.transformers import monkey_patch

    inputs = {key: x.to("cuda") for key, x in batch(num_rows=2, num_tokens=NUM_TOKENS).items()}

    def model_on_gpu() -> nn.Module:
        causal_lm = tiny_llama(num_layers=2, dtype=torch.float32)
        model = (with_lora(causal_lm) if lora else causal_lm).to("cuda")
        monkey_patch._apply_liger_kernel_to_instance(model=causal_lm, fused_linear_cross_entropy=False)
        return model

    expected = gradients(model_on_gpu(), inputs)
    chunked = chunk_model(model_on_gpu(), config_of(**CONFIGS[name]))
    assert largest_difference(gradients(chunked, inputs), expected) < 1e-5
