"""The tiled loss is the model's loss, and nobody ever makes the logits of a whole sequence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, Gemma2Config, GraniteConfig, PreTrainedModel

from chunkdist import ChunkConfig, chunk_model
from chunkdist.loss import cross_entropy as loss
from chunkdist.loss.cross_entropy import linear_cross_entropy
from chunkdist.loss.lazy_logits import lazy_logits
from chunkdist.loss.token_metrics import token_figures
from tests.helpers.models import VOCAB_SIZE, batch, gradients, largest_difference, tiny_llama
from tests.helpers.waits import Waits

NUM_TOKENS = 40


class LargestTensor(TorchDispatchMode):
    """The largest number of elements that any op returns."""

    num_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor):
                self.num_elements = max(self.num_elements, x.numel())
        return out


def small(config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="plain")
    return model.double().train()


SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "plain": lambda: tiny_llama(num_layers=2),
    "tied": lambda: tiny_llama(num_layers=2, tie_word_embeddings=True),
    "soft-capped and tied": lambda: small(
        Gemma2Config(**SIZES, final_logit_softcapping=30.0, query_pre_attn_scalar=8)
    ),
    "scaled": lambda: small(GraniteConfig(**SIZES, logits_scaling=3.0)),
}


@pytest.fixture
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "TILE_BYTES", 16 * VOCAB_SIZE * 2 * (8 + 4))


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize("name", MODELS)
def test_heads_of_all_kinds(name: str) -> None:
    inputs = batch(num_tokens=NUM_TOKENS, num_rows=2)
    inputs["labels"][0, :25] = -100
    model = chunk_model(MODELS[name](), ChunkConfig(chunk_size=16))
    exact = 1e-6 if "soft-capped" in name else 1e-10  # Gemma's norms sum their weights' gradients in fp32
    assert largest_difference(gradients(model, inputs), gradients(MODELS[name](), inputs)) < exact


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize("arguments", [{"num_items_in_batch": 17}, {"num_items_in_batch": torch.tensor(17)}])
def test_normalisation_by_the_global_batch(arguments: dict[str, Any]) -> None:
    inputs = {**batch(num_tokens=NUM_TOKENS), **arguments}
    model = chunk_model(tiny_llama(), ChunkConfig(chunk_size=16))
    assert largest_difference(gradients(model, inputs), gradients(tiny_llama(), inputs)) < 1e-10


@pytest.mark.usefixtures("_small_tiles")
def test_labels_that_are_shifted_already() -> None:
    inputs = batch(num_tokens=NUM_TOKENS)
    shifted = F.pad(inputs["labels"], (0, 1), value=-100)[:, 1:]
    model = chunk_model(tiny_llama(), ChunkConfig(chunk_size=16))
    found = gradients(model, {**inputs, "labels": inputs["labels"] * 0, "shift_labels": shifted})
    assert largest_difference(found, gradients(tiny_llama(), inputs)) < 1e-10


def test_the_logits_of_the_sequence_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    vocab_size, num_tokens = 4096, 256
    monkeypatch.setattr(loss, "TILE_BYTES", 32 * vocab_size * 2 * (8 + 4))
    sizes: dict[str, int] = {}
    for name, chunked in (("plain", False), ("chunked", True)):
        model = tiny_llama(num_layers=1, vocab_size=vocab_size)
        if chunked:
            chunk_model(model, ChunkConfig(chunk_size=16))
        ids = torch.randint(0, vocab_size, (1, num_tokens))
        with LargestTensor() as largest:
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        sizes[name] = largest.num_elements
    assert sizes["plain"] >= vocab_size * num_tokens
    assert sizes["chunked"] == vocab_size * 32, "a tile; the head's weight has as many elements"


def test_a_loss_of_the_models_own_gets_its_logits() -> None:
    def own_loss(logits: Tensor, labels: Tensor, vocab_size: int, **kwargs: Any) -> Tensor:
        return logits[:, :-1].square().mean() + labels.float().mean()

    plain, model = tiny_llama(), chunk_model(tiny_llama(), ChunkConfig(chunk_size=16))
    plain.loss_function = model.loss_function = own_loss
    assert largest_difference(gradients(model, batch()), gradients(plain, batch())) < 1e-10


def test_nothing_is_left_in_the_model() -> None:
    model = tiny_llama()
    before = [set(module.__dict__) for module in (model, model.lm_head)]
    with pytest.raises(KeyboardInterrupt), lazy_logits(model):
        raise KeyboardInterrupt
    assert [set(module.__dict__) for module in (model, model.lm_head)] == before


def test_all_labels_ignored() -> None:
    model, inputs = chunk_model(tiny_llama(), ChunkConfig(chunk_size=16)), batch()
    inputs["labels"].fill_(-100)
    output = model(**inputs)
    output.loss.backward()
    assert output.loss == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_items", [None, 5000])
def test_never_worse_than_plain_in_the_same_dtype(dtype: torch.dtype, num_items: int | None) -> None:
    torch.manual_seed(0)
    labels = torch.randint(0, 500, (300,))
    labels[::7] = -100
    hidden, head = torch.randn(300, 64), nn.Linear(64, 500, bias=True)

    def grads(compute: Any, dtype: torch.dtype) -> list[Tensor]:
        x, w, b = (t.detach().to(dtype).requires_grad_() for t in (hidden, head.weight, head.bias))
        value = compute(x, w, b) * 1024  # as a loss scaler does
        return [t.double() / 1024 for t in (value.detach(), *torch.autograd.grad(value, (x, w, b)))]

    def plain(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        logits = F.linear(x, w, b)
        total = F.cross_entropy(logits if dtype == torch.float64 else logits.float(), labels, reduction="sum")
        return total / (num_items or int((labels != -100).sum()))

    truth = grads(lambda *args: plain(*args), torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "TILE_BYTES", 64 * 500 * 2 * 8)
        tiled = grads(lambda x, w, b: linear_cross_entropy(x, w, b, labels, num_items=num_items), dtype)
    for gt, ref, x in zip(truth, grads(plain, dtype), tiled, strict=True):
        assert (gt - x).norm() <= (gt - ref).norm() + torch.finfo(
            dtype
        ).eps * gt.norm()  # a tile rounds its own


def test_no_tile_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the figures that the launcher logs, too; labels are looked at once, before the tiles."""
    monkeypatch.setattr(loss, "TILE_BYTES", 16 * VOCAB_SIZE * 2 * 8)
    hidden = torch.randn(100, 8, requires_grad=True)
    weight = torch.randn(VOCAB_SIZE, 8, requires_grad=True)
    labels = torch.arange(100) % VOCAB_SIZE
    labels[10:50] = -100
    with token_figures() as figures, Waits() as waits:
        linear_cross_entropy(hidden, weight, None, labels).backward()
    assert waits.names == []
    kept = labels != -100
    logits = (hidden @ weight.T).detach()[kept]
    entropy = torch.distributions.Categorical(logits=logits).entropy().sum()
    torch.testing.assert_close(figures.entropy, entropy)
    assert figures.num_correct == (logits.argmax(-1) == labels[kept]).sum()


@pytest.mark.parametrize(
    ("vocab_size", "element_bytes", "expected"),
    [(128256, 2, 256), (262144, 2, 128), (128256, 4, 256), (2_000_000, 2, 22), (32_000_000, 2, 16)],
)
def test_tiles_are_of_whole_128_tokens(vocab_size: int, element_bytes: int, expected: int) -> None:
    assert loss.tile_tokens(vocab_size, element_bytes) == expected
