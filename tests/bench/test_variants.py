"""The variants that are timed are right, and are what they are called."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu
from torch.utils._python_dispatch import TorchDispatchMode

from chunkdist.bench import rounds
from chunkdist.bench.models import SIZES
from chunkdist.bench.variants import (
    BASELINE,
    REBUILT,
    SELECTIVE,
    TWICE,
    Variant,
    baselines,
    chunked,
    extras,
    prepared,
)


@pytest.fixture(scope="module")
def lora_model() -> Any:
    return replace(SIZES["smoke"], lora_rank=2).model("cpu", torch.float32)


def test_every_variant_has_the_gradients_of_the_plain_model(lora_model: Any) -> None:
    """50 tokens: the last chunk is not full."""
    ids = replace(SIZES["smoke"], num_tokens=50).tokens("cpu")
    lora_model.zero_grad()
    lora_model(input_ids=ids, labels=ids).loss.backward()
    trained = {name: p for name, p in lora_model.named_parameters() if p.requires_grad}
    expected = {name: p.grad.clone() for name, p in trained.items()}
    assert len(expected) == 8
    assert all(grad.norm() > 0 for grad in expected.values())
    for variant in [*baselines(16, on_gpu=False), *chunked(16), *extras(["all"], 16, on_gpu=False)]:
        _, why_not = rounds.attempt(lora_model, ids, variant)
        assert why_not is None, variant.name
        found = {name: p.grad for name, p in trained.items()}
        assert rounds.largest_difference(found, expected) < 1e-5, variant.name
    assert lora_model.get_base_model().config._attn_implementation == "sdpa", "they leave no trace"


class Kernels(TorchDispatchMode):
    """Counts the calls of attention's forward."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "num_passes"), [(BASELINE, 2), (SELECTIVE, 1), (TWICE, 2), (REBUILT, 1)])
def test_what_keeps_attentions_outputs_runs_its_forward_once(name: str, num_passes: int) -> None:
    sizes = SIZES["smoke"]
    model, ids = sizes.model("cpu", torch.float32), sizes.tokens("cpu")
    known = [*baselines(sizes.num_tokens, on_gpu=False), *chunked(sizes.num_tokens)]
    variant = next(variant for variant in known if variant.name == name)
    with prepared(model, variant, on_gpu=False) as step, Kernels() as kernels:
        step(ids)
    assert kernels.count == num_passes * sizes.num_layers


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_inputs_of_layers_are_handed_to_the_host_and_nothing_else(
    lora_rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No weight, nothing that the last norm, the head or the loss save, nothing twice."""
    saved: list[Tensor] = []
    real = save_on_cpu.__init__

    def counting(self: save_on_cpu, pin_memory: bool) -> None:
        real(self, pin_memory)
        pack = self.pack_hook
        self.pack_hook = lambda x: (saved.append(x), pack(x))[1]

    monkeypatch.setattr(save_on_cpu, "__init__", counting)
    sizes = replace(SIZES["smoke"], lora_rank=lora_rank)
    model, ids = sizes.model("cpu", torch.float32), sizes.tokens("cpu")
    parameters = {p.data_ptr() for p in model.parameters()}
    variant = next(variant for variant in baselines(16, on_gpu=False) if variant.saved_on_host)
    assert rounds.attempt(model, ids, variant, is_timed=False) == (None, None)
    hidden = torch.Size((1, sizes.num_tokens, sizes.hidden_size))
    assert [x.shape for x in saved if x.numel() > 1] == [hidden] * sizes.num_layers
    assert not parameters & {x.data_ptr() for x in saved}
    saved.clear()
    assert rounds.attempt(model, ids, Variant(name=BASELINE), is_timed=False) == (None, None)
    assert saved == [], "it leaves no trace"


def test_extras_are_of_the_fastest_variant_and_of_the_baseline_where_they_concern_it() -> None:
    names = [variant.name for variant in extras(["all"], 16, on_gpu=True)]
    kept = "chunked, K/V kept"
    assert names[:2] == [f"{kept}, narrow K/V gradients", f"{kept}, attention varlen"]
    assert names[-2:] == [f"{BASELINE}, attention cudnn", f"{kept}, attention cudnn"], (
        "a bad access loses the rest"
    )
    (narrow,) = extras(["bf16-kv-grads"], 16, on_gpu=False)
    assert narrow.config is not None
    assert (narrow.config.kv_grad_dtype, narrow.config.rebuild_kv) == (None, False)
    baseline, chunks = extras(["cudnn"], 16, on_gpu=True)
    assert (baseline.config, baseline.kernel) == (None, "cudnn")
    assert chunks.config is not None
    assert chunks.config.attention == "cudnn"


@pytest.mark.parametrize(
    ("kernel", "flash", "cudnn"), [("flash", True, False), ("cudnn", False, True), ("any", True, True)]
)
def test_on_a_gpu_unchunked_variants_run_the_kernel_that_they_name(
    kernel: Any, flash: bool, cudnn: bool, lora_model: Any
) -> None:
    enabled = torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.cudnn_sdp_enabled
    for method in ("plain", "checkpointing"):
        with prepared(lora_model, Variant(name="a", method=method, kernel=kernel), on_gpu=True):  # type: ignore[arg-type]
            assert [is_on() for is_on in enabled] == [flash, cudnn]
        assert all(is_on() for is_on in enabled)
