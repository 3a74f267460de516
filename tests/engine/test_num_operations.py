"""What a cell asks of the device beside the model's own operations: counted by a dispatch mode, as what one
chunk more adds to a step."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from chunkdist import ChunkConfig, chunk_model, unchunk_model
from chunkdist.loss.cross_entropy import linear_cross_entropy
from chunkdist.memory.live_bytes import LiveBytes
from chunkdist.models.peft_casts import CAST
from chunkdist.replay import no_leaf
from tests.helpers.models import VOCAB_SIZE, batch, gradients, tiny_llama, with_lora
from tests.helpers.waits import Waits

NUM_LAYERS, CHUNK = 2, 16
MATRICES = 7  # of a layer


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def model_of(kind: str) -> nn.Module:
    model = tiny_llama(num_layers=NUM_LAYERS, dtype=torch.float32 if kind == "full" else torch.bfloat16)
    model = with_lora(model) if kind == "LoRA" else model
    for parameter in model.parameters():
        parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    return chunk_model(model, ChunkConfig(chunk_size=CHUNK))


def counts(kind: str, num_chunks: int) -> tuple[Counter[str], Counter[str]]:
    """Of a step's forward and backward under autocast."""
    model = model_of(kind)
    inputs = {**batch(num_tokens=num_chunks * CHUNK), "use_cache": False}
    with Operations() as forward, torch.autocast("cpu", torch.bfloat16):
        loss = model(**inputs).loss
    with Operations() as backward:
        loss.backward()
    return forward.counts, backward.counts


def of_a_cell(kind: str) -> tuple[Counter[str], Counter[str]]:
    (forward, backward), (forward_more, backward_more) = counts(kind, 3), counts(kind, 4)
    return (
        Counter({name: (forward_more[name] - forward[name]) / NUM_LAYERS for name in forward_more}),  # type: ignore[arg-type]
        Counter({name: (backward_more[name] - backward[name]) / NUM_LAYERS for name in backward_more}),  # type: ignore[arg-type]
    )


def test_adapters_are_cast_and_added_up_together() -> None:
    forward, backward = of_a_cell("LoRA")
    # Two norms compute in fp32, attention merges two parts in fp32; nothing for the adapters' inputs.
    assert forward["_to_copy"] <= 8
    # Gradients of two matrices an adapter come in fp32, in one cast each, and are added by one operation.
    assert backward["_to_copy"] <= 30
    assert backward["_foreach_add_"] == 1


def test_weights_are_cast_once_a_group() -> None:
    _, backward = of_a_cell("full")
    assert backward["_to_copy"] <= 37, "each matrix's gradient, norms, attention; 10 more with casts a cell"


def test_no_group_keeps_the_narrow_weights_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the forward: at the end of each group autocast has none."""
    cleared: list[None] = []
    real = torch.clear_autocast_cache
    monkeypatch.setattr(torch, "clear_autocast_cache", lambda: (cleared.append(None), real()))
    model = model_of("full")
    with torch.autocast("cpu", torch.bfloat16):
        model(**batch(num_tokens=40), use_cache=False)
        assert len(cleared) >= NUM_LAYERS + 1, "and at the end of the norm"


@pytest.mark.parametrize("kind", ["LoRA", "full"])
def test_no_cell_waits_for_the_device(kind: str) -> None:
    num_waits = []
    for num_chunks in (2, 5):
        model = model_of(kind)
        with torch.autocast("cpu", torch.bfloat16), Waits() as waits:
            loss = model(**batch(num_tokens=num_chunks * CHUNK), use_cache=False).loss
            loss.backward()
        num_waits.append(len(waits.names))
    assert num_waits[0] == num_waits[1], waits.names


def test_casts_that_change_nothing_are_left_out_and_put_back() -> None:
    """The same bits; where something reads the fp32 numbers, they are made."""
    for dropout in (0.0, 0.3):
        plain, chunked = (with_lora(tiny_llama(num_layers=2, dtype=torch.bfloat16)) for _ in range(2))
        for model in (plain, chunked):
            for name, module in model.named_modules():
                if name.endswith(("lora_dropout.default", "lora_A.default")):
                    module.float()
            for module in model.modules():
                if dropout and hasattr(module, "lora_dropout"):
                    module.lora_dropout["default"] = nn.Dropout(dropout)
        chunk_model(chunked, ChunkConfig(chunk_size=1000))
        adapters = [module for module in chunked.modules() if CAST in module.__dict__]
        assert len(adapters) == 2 * MATRICES
        x = torch.randn(1, 5, 32, dtype=torch.bfloat16)
        seen: list[torch.dtype] = []
        adapters[0].lora_A["default"].register_forward_pre_hook(  # type: ignore[index]
            lambda module, args, seen=seen: seen.append(args[0].dtype)
        )
        with torch.autocast("cpu", torch.bfloat16):
            adapters[0](x)
        assert seen == [torch.float32 if dropout else torch.bfloat16]
        unchunk_model(chunked)
        assert not any(CAST in module.__dict__ for module in chunked.modules())


def test_the_same_bits_as_with_the_casts(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for leaves_out in (True, False):
        if not leaves_out:
            monkeypatch.setattr("chunkdist.models.peft_casts._is_cast_back", lambda module, x: False)
        model = model_of("LoRA")
        with torch.autocast("cpu", torch.bfloat16):
            found.append(gradients(model, batch(num_tokens=40)))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_autocast_keeps_no_chunk_as_if_it_were_a_weight() -> None:
    """Where the first thing that reads a cell's leaf is a product: it, its cast and its gradient die."""
    weight = torch.randn(4, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        for keeps in (True, False):
            leaf = torch.randn(3, 4, requires_grad=True)
            dies = weakref.ref(leaf)
            torch.nn.functional.linear(leaf if keeps else no_leaf(leaf), weight).sum().backward()
            assert leaf.grad is not None
            del leaf
            assert (dies() is None) is not keeps


def test_tiles_of_the_loss_are_not_kept() -> None:
    hidden_size, live_bytes = 64, []
    weight = torch.randn(VOCAB_SIZE, hidden_size, requires_grad=True)
    for num_tokens in (100, 1100):
        hidden = torch.randn(num_tokens, hidden_size, requires_grad=True)
        labels = torch.arange(num_tokens) % VOCAB_SIZE
        exclude = [hidden, weight, labels]
        with LiveBytes(exclude=exclude) as live, torch.autocast("cpu", torch.bfloat16):
            loss = linear_cross_entropy(hidden, weight, None, labels)
            live_bytes.append(live.current_bytes)
        del loss
    per_token = (live_bytes[1] - live_bytes[0]) / 1000
    assert per_token == 4 * hidden_size, "its gradient, and nothing else"
