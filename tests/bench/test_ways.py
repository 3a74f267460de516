"""The ways that are timed are right, and are what they are called."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu

from chunkdist.bench import rounds
from chunkdist.bench.sizes import SIZES
from chunkdist.bench.ways import (
    BASELINE,
    PLANNED,
    VARIANTS,
    Variant,
    Way,
    baselines,
    chunked,
    prepared,
    variants,
)


@pytest.fixture(scope="module")
def lora_model() -> Any:
    return replace(SIZES["smoke"], lora_rank=2).model("cpu", torch.float32)


@pytest.mark.parametrize("way", [*baselines(16, on_gpu=False), *chunked(16)], ids=lambda way: way.name)
def test_every_way_has_the_gradients_of_the_plain_model(lora_model: Any, way: Way) -> None:
    """50 tokens: the last chunk is not full."""
    ids = replace(SIZES["smoke"], num_tokens=50).tokens("cpu")
    lora_model.zero_grad()
    lora_model(input_ids=ids, labels=ids).loss.backward()
    trained = {name: p for name, p in lora_model.named_parameters() if p.requires_grad}
    expected = {name: p.grad.clone() for name, p in trained.items()}
    assert len(expected) == 8
    assert all(grad.norm() > 0 for grad in expected.values())
    assert rounds.attempt(lora_model, ids, way).why_not is None
    assert rounds.largest_difference({name: p.grad for name, p in trained.items()}, expected) < 1e-5


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
    way = next(way for way in baselines(16, on_gpu=False) if way.saved_on_host)
    assert rounds.attempt(model, ids, way, is_timed=False).why_not is None
    hidden = torch.Size((1, sizes.num_tokens, sizes.hidden_size))
    assert [x.shape for x in saved if x.numel() > 1] == [hidden] * sizes.num_layers
    assert not parameters & {x.data_ptr() for x in saved}
    saved.clear()
    assert rounds.attempt(model, ids, Way(name=BASELINE), is_timed=False).why_not is None
    assert saved == [], "it leaves no trace"


def test_variants_are_of_the_ways_that_they_concern() -> None:
    entered: list[str] = []

    @contextmanager
    def compiled(model: Any) -> Iterator[None]:
        own = model.get_decoder().layers[0].__dict__
        entered.append("enter chunked" if "forward" in own else "enter")
        yield
        entered.append("leave chunked" if "forward" in own else "leave")

    both = Variant(label="other parts", around=compiled)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(VARIANTS, "both", both)
        patch.setitem(
            VARIANTS, "nowhere", Variant(label="n", config={"offload": "host"}, needs="no_such_package")
        )
        found = variants(["bf16-kv-grads", "both"], 16, on_gpu=True)
        names = [way.name for way in found]
        assert names == [
            "chunked, K/V kept, narrow K/V gradients",
            f"{BASELINE}, other parts",
            "chunked, K/V kept, other parts",
        ]
        assert found[0].config is not None
        assert found[0].config.kv_grad_dtype is None
        everywhere = {way.name for way in variants(["all"], 16, on_gpu=False)}
        assert everywhere == set(names), "nothing for a GPU, no package that is not there"
        on_gpu = {way.name for way in variants(["all"], 16, on_gpu=True)}
        kept = "chunked, K/V kept"
        assert {f"{kept}, attention varlen", f"{kept}, compiled", f"{BASELINE}, compiled"} <= on_gpu
    last = [way.name for way in variants(["all"], 16, on_gpu=True)][-2:]
    assert last == [f"{BASELINE}, attention cudnn", f"{kept}, attention cudnn"], "a bad access loses the rest"
    model, ids = SIZES["smoke"].model("cpu", torch.float32), SIZES["smoke"].tokens("cpu")
    planned = next(way for way in chunked(16) if way.name == PLANNED)
    assert planned.begins_slowly
    for way in found[1:]:
        assert way.begins_slowly
        assert rounds.attempt(model, ids, way, warms_up=False).why_not is None
    assert entered == ["enter", "leave"] * 2


def test_kernels_of_variants_concern_the_baseline_too() -> None:
    variant = Variant(label="cuDNN", config={"attention": "math"}, kernel="cudnn")
    plain, chunks = variant.of(Way(name="a")), variant.of(chunked(16)[0])
    assert plain is not None
    assert (plain.kernel, plain.name) == ("cudnn", "a, cuDNN")
    assert chunks is not None
    assert chunks.config is not None
    assert (chunks.config.attention, chunks.config.rebuild_kv) == ("math", False)
    assert Variant(label="", config={"kv_grad_dtype": None}).of(Way(name="a")) is None


@pytest.mark.parametrize(
    ("kernel", "flash", "cudnn"), [("flash", True, False), ("cudnn", False, True), ("any", True, True)]
)
def test_on_a_gpu_unchunked_ways_run_the_kernel_that_they_name(
    kernel: Any, flash: bool, cudnn: bool, lora_model: Any
) -> None:
    enabled = torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.cudnn_sdp_enabled
    for method in ("plain", "checkpointing"):
        with prepared(lora_model, Way(name="a", method=method, kernel=kernel), on_gpu=True):  # type: ignore[arg-type]
            assert [is_on() for is_on in enabled] == [flash, cudnn]
        assert all(is_on() for is_on in enabled)
