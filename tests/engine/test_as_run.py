"""The backward of a chunked model is that of what ran in the forward, whatever has been done to the model
since: equal to the unchunked model, or refused where weights were written to."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.modules.module import register_module_forward_hook
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP

from chunkdist import ChunkConfig, UnsupportedModelError, chunk_model, unchunk_model
from chunkdist.check.gradients import check_gradients
from chunkdist.engine.as_run import LayersAsRun
from chunkdist.engine.rerun_witness import RerunWitness
from tests.helpers.models import batch, largest_difference, tiny_llama, with_lora

INPUTS = {**batch(num_rows=2, num_tokens=19), "use_cache": False}
CONFIGS = {
    "rerun": ChunkConfig(chunk_size=5),
    "groups of two, two retained": ChunkConfig(chunk_size=5, layers_per_group=2, retained_chunks=2),
    "K/V kept": ChunkConfig(chunk_size=5, layers_per_group="all", rebuild_kv=False),
}
Change = Callable[[Any], None]


def adapters() -> Any:
    """Two, the first one active, neither without an effect."""
    model = with_lora(tiny_llama(num_layers=2), lora_dropout=0.0)
    model.add_adapter("other", LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    return model.double().train()


def plain() -> Any:
    return tiny_llama(num_layers=2)


def layer(model: Any) -> Any:
    return next(module for module in model.modules() if type(module).__name__ == "LlamaDecoderLayer")


def double(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 2


def step(model: Any, before: Change, between: Change) -> dict[str, Tensor]:
    before(model)
    loss = model(**INPUTS).loss
    between(model)
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


def scale(model: Any, factor: float) -> None:
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.scaling["default"] *= factor


def add_hook(model: Any) -> None:
    layer(model).self_attn.v_proj.register_forward_hook(double)


def drop_hooks(model: Any) -> None:
    layer(model).self_attn.v_proj._forward_hooks.clear()


def replace(model: Any) -> None:
    torch.manual_seed(7)
    layer(model).mlp.up_proj = nn.Linear(32, 48, bias=False, dtype=torch.float64)


def replace_parameter(model: Any) -> None:
    layer(model).mlp.down_proj.weight = nn.Parameter(torch.randn(32, 48, dtype=torch.float64))


def override(model: Any) -> None:
    layer(model).mlp.forward = lambda x: x * 3


def thaw(model: Any) -> None:
    for p in layer(model).parameters():
        p.requires_grad_(True)


def freeze(model: Any) -> None:
    for p in layer(model).parameters():
        p.requires_grad_(False)


def nothing(model: Any) -> None:
    pass


def train_all_adapters(model: Any) -> None:
    """PEFT freezes those that are not active, and autograd asks in the backward."""
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name)


def other_adapter(model: Any) -> None:
    model.set_adapter("other")
    train_all_adapters(model)


def no_adapter(model: Any) -> None:
    model.base_model.disable_adapter_layers()
    train_all_adapters(model)


def add_hook_on_all(model: Any) -> None:
    def edit(module: nn.Module, args: Any, output: Any) -> Any:
        return output * 2 if type(module) is LlamaMLP else None

    model.handle = [register_module_forward_hook(edit)]


def drop_hook_on_all(model: Any) -> None:
    model.handle.pop().remove()


def patch_classes(model: Any) -> None:
    model.forwards = {kind: kind.forward for kind in (LlamaMLP, LlamaDecoderLayer)}
    for kind, forward in model.forwards.items():
        kind.forward = lambda self, x, forward=forward, **kwargs: forward(self, x, **kwargs) * 2


def unpatch_classes(model: Any) -> None:
    for kind, forward in model.forwards.items():
        kind.forward = forward


RESTORED: dict[str, tuple[Callable[[], Any], Change, Change]] = {
    "another adapter": (adapters, nothing, other_adapter),
    "no adapter": (adapters, nothing, no_adapter),
    "an adapter deleted": (adapters, nothing, lambda model: model.delete_adapter("other")),
    "another scaling": (adapters, nothing, lambda model: scale(model, 5.0)),
    "a hook removed": (plain, add_hook, drop_hooks),
    "a hook added": (plain, nothing, add_hook),
    "a hook on all modules removed": (plain, add_hook_on_all, drop_hook_on_all),
    "forwards set on classes for the time of a call": (plain, patch_classes, unpatch_classes),
    "a module replaced": (plain, nothing, replace),
    "a parameter replaced": (plain, nothing, replace_parameter),
    "a forward overridden": (plain, nothing, override),
    "frozen before, trained after": (adapters, nothing, thaw),
    "trained before, frozen after": (plain, nothing, freeze),
    "no chunks any more": (
        plain,
        nothing,
        lambda model: hasattr(layer(model), "_z3_leaf") and unchunk_model(model),
    ),
}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", RESTORED)
def test_what_was_changed_does_not_matter(name: str, config: str) -> None:
    make, before, between = RESTORED[name]
    expected = step(make(), before, between)
    model = chunk_model(make(), CONFIGS[config])
    found = step(model, before, between)
    assert len(expected) > 5
    assert largest_difference(found, expected) < 1e-10


def test_an_adapter_that_is_frozen_before_the_backward_gets_no_gradient_and_no_other_does() -> None:
    def switch(model: Any) -> None:
        model.set_adapter("other")

    assert step(adapters(), nothing, switch).keys() == {"loss"}
    assert step(chunk_model(adapters(), CONFIGS["rerun"]), nothing, switch).keys() == {"loss"}


def test_what_was_changed_stays_changed() -> None:
    model = chunk_model(adapters(), CONFIGS["rerun"])
    step(model, add_hook, lambda model: (model.set_adapter("other"), drop_hooks(model), model.eval()))
    module = layer(model).self_attn.v_proj
    assert module.active_adapters == ["other"]
    assert not module._forward_hooks
    assert not module.training


def test_dropout_of_a_model_that_is_evaluated_before_its_backward() -> None:
    """One chunk draws what the unchunked model draws."""

    def found(config: ChunkConfig | None) -> dict[str, Tensor]:
        model = with_lora(tiny_llama(num_layers=2), lora_dropout=0.5).double().train()
        if config is not None:
            chunk_model(model, config)
        torch.manual_seed(3)
        return step(model, nothing, lambda model: model.eval())

    assert largest_difference(found(ChunkConfig(chunk_size=19)), found(None)) < 1e-10


def test_two_forwards_with_two_adapters_and_one_backward() -> None:
    def found(model: Any) -> dict[str, Tensor]:
        first = model(**INPUTS).loss
        model.set_adapter("other")
        second = model(**INPUTS).loss
        train_all_adapters(model)
        (first + 2 * second).backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert any("default" in name for name in grads)
        assert any("other" in name for name in grads)
        return {"loss": first.detach(), **grads}

    assert largest_difference(found(chunk_model(adapters(), CONFIGS["rerun"])), found(adapters())) < 1e-10


def test_a_module_that_collects_tensors_in_a_list_of_its_own() -> None:
    """The list holds other tensors when the first backward comes, and these are not compared by value."""

    def collect(module: Any, args: Any, output: Tensor) -> None:
        module.seen.append(output.detach())

    found = []
    for config in (None, CONFIGS["rerun"]):
        model = plain()
        mlp = layer(model).mlp
        mlp.seen = []
        mlp.register_forward_hook(collect)
        if config is not None:
            chunk_model(model, config)
        first = model(**INPUTS).loss
        mlp.seen.clear()
        second = model(**INPUTS).loss
        of_second = list(mlp.seen)
        first.backward()
        assert all(x is y for x, y in zip(mlp.seen, of_second, strict=True))
        second.backward()
        grads = {name: p.grad for name, p in model.named_parameters()}
        found.append({"loss": second.detach(), **grads})
    assert largest_difference(*found) < 1e-10


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("lent", ["all", "frozen but for q_proj", "computed"])
def test_functional_call(lent: str, config: str) -> None:
    def found(model: Any) -> dict[str, Tensor]:
        own = {name: p.detach().clone() for name, p in model.named_parameters()}
        factor = torch.tensor(1.5, dtype=torch.float64, requires_grad=lent == "computed")
        weights = {
            name: p * factor
            if lent == "computed"
            else (p * 1.5).requires_grad_(lent == "all" or "q_proj" in name)
            for name, p in own.items()
        }
        loss = functional_call(model, weights, args=(), kwargs=INPUTS).loss
        roots = (
            {"factor": factor}
            if lent == "computed"
            else {n: w for n, w in weights.items() if w.requires_grad}
        )
        grads = torch.autograd.grad(loss, [*roots.values()])
        for name, p in model.named_parameters():
            assert isinstance(p, nn.Parameter)
            assert p.grad is None
            assert torch.equal(p, own[name])
        return {"loss": loss.detach(), **dict(zip(roots, grads, strict=True))}

    assert largest_difference(found(chunk_model(plain(), CONFIGS[config])), found(plain())) < 1e-10


@pytest.mark.parametrize("transform", ["grad", "vmap"])
def test_transforms_are_refused(transform: str) -> None:
    model = chunk_model(plain(), CONFIGS["rerun"])
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(weights: dict[str, Tensor], ids: Tensor) -> Any:
        return functional_call(model, weights, args=(), kwargs={"input_ids": ids, "labels": ids}).loss

    ids = INPUTS["input_ids"]
    with pytest.raises(ValueError, match=r"inside a transform of torch\.func.*functional_call"):
        grad(loss)(weights, ids) if transform == "grad" else vmap(loss, (None, 0))(weights, ids[:, None])


def weight(model: Any) -> Any:
    return layer(model).mlp.down_proj.weight


def in_place(model: Any) -> None:
    with torch.no_grad():
        weight(model)[3] += 0.1


def optimizer_step(model: Any) -> None:
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def other_data(model: Any) -> None:
    weight(model).data = 1.5 * weight(model).data


def through_data(model: Any) -> None:
    weight(model).data.mul_(1.5)


def a_buffer(model: Any) -> None:
    layer(model).mlp.offset.add_(1)


def add_buffer(model: Any) -> None:
    mlp = layer(model).mlp
    mlp.register_buffer("offset", torch.zeros(32, dtype=torch.float64))
    mlp.register_forward_hook(lambda module, args, output: output + module.offset)


def lora_matrix(model: Any) -> None:
    with torch.no_grad():
        next(m for m in model.modules() if isinstance(m, LoraLayer)).lora_B["default"].weight.zero_()


WRITTEN: dict[str, tuple[Callable[[], Any], Change, Change]] = {
    "in place": (plain, nothing, in_place),
    "an optimizer's step": (plain, nothing, optimizer_step),
    "other data": (plain, nothing, other_data),
    "through data": (plain, nothing, through_data),
    "a buffer": (plain, add_buffer, a_buffer),
    "an adapter's matrix": (adapters, nothing, lora_matrix),
    "merged": (adapters, nothing, lambda model: model.merge_adapter()),
    "merged, and the adapter gone": (adapters, nothing, lambda model: model.merge_and_unload()),
}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", WRITTEN)
def test_weights_that_were_written_to(name: str, config: str) -> None:
    make, before, between = WRITTEN[name]
    model = chunk_model(make(), CONFIGS[config])
    with pytest.raises(UnsupportedModelError, match="written to between the forward and its backward"):
        step(model, before, between)
    model.zero_grad()
    if "merged" not in name:
        assert len(step(model, nothing, nothing)) > 5  # the next step is a step again


def test_a_weight_may_be_written_to_between_steps() -> None:
    model = chunk_model(plain(), CONFIGS["rerun"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(3):
        model(**INPUTS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def activated() -> Any:
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", alora_invocation_tokens=[5, 6])
    return get_peft_model(plain(), config)


def test_adapters_that_begin_at_a_token_are_refused() -> None:
    """Their hooks are there during the call only; and in each chunk they would count from its end."""
    with pytest.raises(UnsupportedModelError, match="alora_invocation_tokens"):
        chunk_model(activated(), CONFIGS["rerun"])
    model = chunk_model(with_lora(plain()), CONFIGS["rerun"])
    model.add_adapter("later", activated().peft_config["default"])
    with pytest.raises(UnsupportedModelError, match="alora_invocation_tokens"):
        model(**INPUTS)


class Intervening(nn.Module):
    """A user's model that doubles the values of a layer, by a hook that is there during the call only."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_llama(num_layers=2, dtype=torch.float32)

    def get_base_model(self) -> Any:
        return self.inner

    def get_input_embeddings(self) -> Any:
        return self.inner.get_input_embeddings()

    def forward(self, **inputs: Any) -> Any:
        handle = layer(self.inner).self_attn.v_proj.register_forward_hook(double)
        try:
            return self.inner(**inputs)
        finally:
            handle.remove()


def test_the_gradient_check_sees_what_would_not_be_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_gradients(Intervening(), batch(num_tokens=40), ChunkConfig(chunk_size=8)).passed
    monkeypatch.setattr(LayersAsRun, "restored", lambda self: nullcontext())
    with pytest.raises(UnsupportedModelError, match="came to other hidden states"):
        check_gradients(Intervening(), batch(num_tokens=40), ChunkConfig(chunk_size=8))
    monkeypatch.setattr(RerunWitness, "refuse_others", lambda self: None)
    assert not check_gradients(Intervening(), batch(num_tokens=40), ChunkConfig(chunk_size=8)).passed


def test_the_gradient_check_sees_a_model_that_writes_to_its_weights() -> None:
    model = tiny_llama(num_layers=2, dtype=torch.float32)
    model.register_forward_hook(lambda *_: through_data(model))
    with pytest.raises(ValueError, match="written to between the forward and its backward"):
        check_gradients(model, batch(num_tokens=40), ChunkConfig(chunk_size=8))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_adapters_of_parameters_are_not_writes(config: ChunkConfig) -> None:
    """PEFT sets such a weight to itself in each call: here in another forward, and in that one's backward."""
    results = []
    for chunked in (False, True):
        adapter = LoraConfig(r=2, target_parameters=["mlp.up_proj.weight"], init_lora_weights=False)
        torch.manual_seed(0)
        model: Any = get_peft_model(plain(), adapter).double().train()
        if chunked:
            chunk_model(model, config)

        def run_again(model: Any) -> None:
            with torch.no_grad():
                model(**INPUTS)
            torch.autograd.grad(model(**INPUTS).loss, [p for p in model.parameters() if p.requires_grad])

        results.append(step(model, lambda model: None, run_again))
    assert largest_difference(results[1], results[0]) < 1e-10


def test_writes_to_adapted_parameters_are_seen() -> None:
    adapter = LoraConfig(r=2, target_parameters=["mlp.up_proj.weight"], init_lora_weights=False)
    model: Any = chunk_model(get_peft_model(plain(), adapter).double().train(), CONFIGS["rerun"])

    def write(model: Any) -> None:
        with torch.no_grad():
            layer(model).mlp.down_proj.weight[0, 1] += 1

    with pytest.raises(UnsupportedModelError, match="written to between the forward and its backward"):
        step(model, lambda model: None, write)
