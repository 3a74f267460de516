"""What users put into layers (hooks, forwards, modules, adapters) is exact token by token, or refused."""

from __future__ import annotations

import copy
import gc
import logging
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any

import pytest
import torch
import torch.nn.modules.module as torch_module
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP

from chunkdist import ChunkConfig, UnsupportedModelError, chunk_model
from chunkdist.check.gradients import check_gradients
from chunkdist.engine import additions, hook_probe
from tests.helpers.models import batch, gradients, largest_difference, tiny_llama, with_lora

CONFIG = ChunkConfig(chunk_size=7)
V = torch.sin(torch.arange(32).double())
Change = Callable[[Tensor], Tensor]


def last_position(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, -1] += V.to(x)
    return x


def little_at_the_last_position(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, -1] *= 1.001
    return x


def mean_of_tokens(x: Tensor) -> Tensor:
    return x + x.mean(1, keepdim=True)


def sum_so_far(x: Tensor) -> Tensor:
    return x + 0.1 * x.cumsum(1)


def token_before(x: Tensor) -> Tensor:
    return x + nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]


def by_position(x: Tensor) -> Tensor:
    return x * (1 + 0.01 * torch.arange(x.shape[1]).to(x))[None, :, None]


def one_position(x: Tensor) -> Tensor:
    return torch.where(torch.arange(x.shape[1])[None, :, None] == 1, 2 * x, x)


def norm_of_all(x: Tensor) -> Tensor:
    return x / x.norm()


def gradients_mixed(x: Tensor) -> Tensor:
    """The numbers are those of `x`; the gradient is not."""
    return x + x.mean(1, keepdim=True) - x.mean(1, keepdim=True).detach()


def noise(x: Tensor) -> Tensor:
    return x + torch.randn_like(x)


MIXING = [
    *(last_position, little_at_the_last_position, mean_of_tokens, sum_so_far, token_before, by_position),
    *(one_position, norm_of_all, gradients_mixed, noise),
]


def steered(x: Tensor) -> Tensor:
    return x + V.to(x)


def projected_out(x: Tensor) -> Tensor:
    unit = (V / V.norm()).to(x)
    return x - (x @ unit)[..., None] * unit


def bounded(x: Tensor) -> Tensor:
    return x * (1 / x.norm(dim=-1, keepdim=True)).clamp(max=1)


TOKENWISE = [steered, projected_out, bounded]


class Around(nn.Module):
    """A module of the user's around one of the model's."""

    def __init__(self, inner: nn.Module, change: Change) -> None:
        super().__init__()
        self.inner, self.change = inner, change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self.inner(x))


def forward_hook(layer: Any, change: Change) -> Any:
    return layer.mlp.register_forward_hook(lambda module, args, output: change(output))


def undecided_hook(layer: Any, change: Change) -> Any:
    """A hook behind a decorator of torch."""
    return layer.mlp.register_forward_hook(torch.enable_grad()(lambda module, args, output: change(output)))


def hook_in_place(layer: Any, change: Change) -> Any:
    def edit(module: nn.Module, args: Any, output: Tensor) -> None:
        output += change(output.clone()) - output

    return layer.mlp.register_forward_hook(edit)


def pre_hook(layer: Any, change: Change) -> Any:
    return layer.mlp.down_proj.register_forward_pre_hook(
        lambda module, args: (torch.cat([change(args[0][..., :32]), args[0][..., 32:]], -1),)
    )


def hook_on_attention(layer: Any, change: Change) -> Any:
    def edit(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        return change(output[0]), *output[1:]

    return layer.self_attn.register_forward_hook(edit, with_kwargs=True)


def pre_hook_with_names(layer: Any, change: Change) -> Any:
    def edit(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    return layer.self_attn.register_forward_pre_hook(edit, with_kwargs=True)


HOOKS = [forward_hook, undecided_hook, hook_in_place, pre_hook, hook_on_attention, pre_hook_with_names]


def module_around(layer: Any, change: Change) -> None:
    layer.mlp = Around(layer.mlp, change)


def projection_around(layer: Any, change: Change) -> None:
    layer.self_attn.o_proj = Around(layer.self_attn.o_proj, change)


def forward_set(layer: Any, change: Change) -> None:
    own = layer.mlp.forward

    @wraps(own)
    def forward(x: Tensor) -> Tensor:
        return change(own(x))

    layer.mlp.forward = forward


CODE = [module_around, projection_around, forward_set]


def model_with(place: Any, change: Change, *, when: str = "before", **config: Any) -> Any:
    model = tiny_llama(num_layers=2)
    config = {"chunk_size": 7, **config}
    if when == "later":
        gradients(chunk_model(model, ChunkConfig(**config)), batch())
    elif when == "after":
        chunk_model(model, ChunkConfig(**config))
    place(model.model.layers[1], change)
    return chunk_model(model, ChunkConfig(**config)) if when == "before" else model


@pytest.mark.parametrize(
    ("place", "change"),
    [
        *((place, change) for place in (forward_hook, module_around) for change in MIXING),
        *((place, change) for place in (*HOOKS[1:], *CODE[1:]) for change in MIXING[:3]),
    ],
)
def test_what_looks_at_other_tokens_is_refused(place: Any, change: Change) -> None:
    model = model_with(place, change)
    with pytest.raises(UnsupportedModelError, match=r"layer 1 \(LlamaDecoderLayer\)"):
        model(**batch())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("change", TOKENWISE)
@pytest.mark.parametrize("place", [*HOOKS, *CODE])
def test_what_treats_each_token_alone_is_exact(place: Any, change: Change) -> None:
    plain = tiny_llama(num_layers=2)
    place(plain.model.layers[1], change)
    found = gradients(model_with(place, change), batch())
    assert largest_difference(found, gradients(plain, batch())) < 1e-10


@pytest.mark.parametrize(
    ("chunk_size", "num_tokens"), [(1, 2), (1, 30), (7, 3), (7, 40), (64, 200), (1000, 2), (1000, 200)]
)
@pytest.mark.parametrize("place", [forward_hook, module_around])
def test_samples_of_any_length(place: Any, chunk_size: int, num_tokens: int) -> None:
    inputs = batch(num_rows=2, num_tokens=num_tokens)
    for change in (last_position, mean_of_tokens, sum_so_far, token_before, by_position):
        with pytest.raises(UnsupportedModelError):
            model_with(place, change, chunk_size=chunk_size)(**inputs)
    model_with(place, steered, chunk_size=chunk_size)(**inputs).loss.backward()


@pytest.mark.parametrize("when", ["after", "later"])
@pytest.mark.parametrize("place", [forward_hook, pre_hook, module_around, forward_set])
def test_what_comes_after_chunking(place: Any, when: str) -> None:
    with pytest.raises(UnsupportedModelError):
        model_with(place, last_position, when=when)(**batch())


@pytest.mark.parametrize("height", [1, "all"])
@pytest.mark.parametrize("config", [{"retained_chunks": 2}, {"offload": "host"}])
def test_schedules(height: Any, config: dict[str, Any]) -> None:
    for place in (forward_hook, module_around):
        with pytest.raises(UnsupportedModelError):
            model_with(place, mean_of_tokens, layers_per_group=height, **config)(**batch())
        plain = tiny_llama(num_layers=2)
        place(plain.model.layers[1], steered)
        model = model_with(place, steered, layers_per_group=height, **config)
        assert largest_difference(gradients(model, batch()), gradients(plain, batch())) < 1e-10


def test_evaluation_is_asked_too() -> None:
    model = model_with(forward_hook, last_position).eval()
    for context in (torch.no_grad, torch.inference_mode):
        with context(), pytest.raises(UnsupportedModelError):
            model(**batch())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("place", [forward_hook, module_around])
def test_narrow_dtypes(place: Any, dtype: torch.dtype) -> None:
    for change in (last_position, mean_of_tokens, sum_so_far, steered, projected_out):
        model = tiny_llama(num_layers=2, dtype=dtype)
        place(model.model.layers[1], change)
        chunk_model(model, CONFIG)
        if change in TOKENWISE:
            model(**batch(num_rows=2, num_tokens=150)).loss.backward()
        else:
            with pytest.raises(UnsupportedModelError):
                model(**batch(num_rows=2, num_tokens=150))


def test_the_message_of_a_hook() -> None:
    with pytest.raises(
        UnsupportedModelError,
        match=r"forward hook <lambda> \(test_additions.py, line \d+\) on mlp of layer 1 .*"
        r"looks at other tokens.*put it on a whole layer",
    ):
        model_with(forward_hook, last_position)(**batch())


def test_a_change_of_the_set_is_asked_and_one_that_is_known_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    check = additions.HookNotes.check

    def note(self: Any) -> bool:
        asked.append(self.hook.path)
        return check(self)

    monkeypatch.setattr(additions.HookNotes, "check", note)
    model = model_with(forward_hook, steered)
    for _ in range(2):
        gradients(model, batch())
    assert asked == ["mlp of layer 1 (LlamaDecoderLayer)"]
    handle = pre_hook(model.model.layers[0], steered)
    gradients(model, batch())
    assert asked[1:] == ["mlp.down_proj of layer 0 (LlamaDecoderLayer)"]
    handle.remove()
    gradients(model, batch())
    assert len(asked) == 2
    gradients(copy.deepcopy(model), batch())
    assert len(asked) == 3


def test_training_and_evaluation_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is asked once; a sample of one token does not count."""
    asked: list[bool] = []
    check = additions.LayerProbe.check

    def note(self: Any, layer: Any, *call: Any) -> None:
        asked.append(layer.layer.training)
        check(self, layer, *call)

    monkeypatch.setattr(additions.LayerProbe, "check", note)
    model = model_with(module_around, steered)
    for _ in range(2):
        model.train()(**batch())
        with torch.no_grad():
            model.eval()(**batch())
    assert asked == [True, False]
    model = model_with(module_around, mean_of_tokens)
    model(batch(num_tokens=1)["input_ids"])
    with pytest.raises(UnsupportedModelError):
        model(**batch())


def test_a_hook_that_does_nothing_yet_is_asked_again() -> None:
    strength = torch.zeros(())
    model = model_with(forward_hook, lambda x: x + strength * (last_position(x) - x))
    gradients(model, batch())
    strength += 1
    with pytest.raises(UnsupportedModelError, match="looks at other tokens"):
        model(**batch())


def test_hooks_of_earlier_steps_are_let_go() -> None:
    """With what they hold: tensors of their step."""
    model = chunk_model(tiny_llama(num_layers=2), CONFIG)
    held = []
    for _ in range(3):
        steering = V.clone()
        handle = model.model.layers[1].mlp.register_forward_hook(
            lambda module, args, output, steering=steering: output + steering
        )
        held.append(weakref.ref(steering))
        gradients(model, batch())
        handle.remove()
        del steering, handle
    gradients(model, batch())
    gc.collect()
    assert [reference() for reference in held] == [None] * 3


def test_hooks_on_whole_layers_stay(caplog: pytest.LogCaptureFixture) -> None:
    """They get the whole sequence, with its graph."""

    def step(model: Any) -> dict[str, Tensor]:
        seen: list[Tensor] = []
        layer = model.model.layers[0]
        layer.register_forward_hook(lambda module, args, output: last_position(output))
        layer.register_forward_hook(lambda module, args, output: seen.append(output))
        model.zero_grad()
        loss = model(**batch(), use_cache=False).loss + 0.01 * seen[0].pow(2).sum()
        loss.backward()
        return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}}

    model = chunk_model(tiny_llama(num_layers=2), CONFIG)
    assert largest_difference(step(model), step(tiny_llama(num_layers=2))) < 1e-10
    assert caplog.text == ""


class TestHooksThatOnlyLook:
    def test_a_warning_in_one_line(self, caplog: pytest.LogCaptureFixture) -> None:
        model = chunk_model(tiny_llama(num_layers=2), CONFIG)
        seen: list[Tensor] = []
        model.model.layers[1].mlp.register_forward_hook(lambda module, args, output: seen.append(output))
        model.model.layers[1].mlp.register_full_backward_hook(lambda *args: None)
        for _ in range(2):
            gradients(model, batch())
        assert len(caplog.records) == 2
        forward, backward = (record.getMessage() for record in caplog.records)
        assert "hook <lambda> (test_additions.py, line" in forward
        assert "on mlp of layer 1 (LlamaDecoderLayer) sees one chunk at a time, without a graph" in forward
        assert "backward hook <lambda>" in backward
        assert "\n" not in forward

    def test_one_that_is_put_there_anew_in_each_step(self, caplog: pytest.LogCaptureFixture) -> None:
        model = chunk_model(tiny_llama(num_layers=2), CONFIG)
        for _ in range(3):
            handle = model.model.layers[1].mlp.register_forward_hook(lambda *args: None)
            gradients(model, batch())
            handle.remove()
        assert len(caplog.records) == 1

    def test_what_was_noted_does_not_wait_for_the_backward(self, monkeypatch: pytest.MonkeyPatch) -> None:
        noted: list[weakref.ref[Tensor]] = []

        def copied(x: Tensor) -> Tensor:
            noted.append(weakref.ref(result := x.clone()))
            return result

        monkeypatch.setattr(hook_probe, "_copy", copied)
        model = chunk_model(tiny_llama(num_layers=2), CONFIG)
        model.model.layers[1].mlp.register_forward_hook(lambda *args: None)
        loss = model(**batch()).loss
        gc.collect()
        assert noted
        assert all(reference() is None for reference in noted)
        loss.backward()

    def test_one_that_hands_on_what_it_got(self, caplog: pytest.LogCaptureFixture) -> None:
        model = model_with(lambda layer, _: layer.mlp.register_forward_hook(lambda m, i, o: o), steered)
        gradients(model, batch())
        assert len(caplog.records) == 1

    def test_not_in_evaluation(self, caplog: pytest.LogCaptureFixture) -> None:
        model = model_with(lambda layer, _: layer.mlp.register_forward_hook(lambda m, i, o: None), steered)
        with torch.no_grad():
            model(**batch())
            model.eval()(**batch())
        assert caplog.text == ""

    def test_gradients_are_exact(self) -> None:
        model = model_with(lambda layer, _: layer.mlp.register_forward_hook(lambda m, i, o: None), steered)
        expected = gradients(tiny_llama(num_layers=2), batch())
        assert largest_difference(gradients(model, batch()), expected) < 1e-10


def only_with_a_graph(seen: list[int]) -> Any:
    return lambda module, args, output: output * 2 if torch.is_grad_enabled() else None


def only_with_a_graph_in_place(seen: list[int]) -> Any:
    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.mul_(2)

    return hook


def norm_of_gradients(seen: list[int]) -> Any:
    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(norm_of_all)

    return hook


def first_call(seen: list[int]) -> Any:
    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        seen.append(1)
        return output * 2 if len(seen) == 1 else None

    return hook


def not_single_tokens(seen: list[int]) -> Any:
    return lambda module, args, output: output * 2 if output.shape[1] > 1 else None


def by_a_mask_of_the_sequence(seen: list[int]) -> Any:
    mask = torch.arange(batch()["input_ids"].shape[1]) % 2 == 0
    return lambda module, args, output: output * mask[None, :, None]


def with_a_hook_on_what_it_gets(seen: list[int]) -> Any:
    return lambda module, args, output: output.register_hook(lambda grad: grad * 2) and None


class TestHooksOfOtherShapes:
    """Each would train something else than without chunks, or fail in torch."""

    @pytest.mark.parametrize(
        "make",
        [
            *(
                only_with_a_graph,
                only_with_a_graph_in_place,
                norm_of_gradients,
                first_call,
                not_single_tokens,
            ),
            *(by_a_mask_of_the_sequence, with_a_hook_on_what_it_gets),
        ],
    )
    @pytest.mark.parametrize("retained", [0, 1])
    def test_refused(self, make: Any, retained: int) -> None:
        model = chunk_model(tiny_llama(num_layers=2), replace(CONFIG, retained_chunks=retained))
        model.model.layers[1].mlp.register_forward_hook(make([]))
        with pytest.raises(UnsupportedModelError, match=r"hook .* on mlp of layer 1"):
            gradients(model, batch())

    def test_a_gradient_that_is_changed_by_token(self) -> None:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(bounded)

        found = []
        for model in (tiny_llama(num_layers=2), chunk_model(tiny_llama(num_layers=2), CONFIG)):
            model.model.layers[1].mlp.register_forward_hook(hook)
            found += [gradients(model, batch()) for _ in range(2)]
        assert largest_difference(found[2], found[0]) < 1e-10
        assert largest_difference(found[3], found[1]) < 1e-10

    def test_one_that_only_looks_is_called_by_the_passes_alone(self) -> None:
        model, seen = chunk_model(tiny_llama(num_layers=2), CONFIG), []
        model.model.layers[1].mlp.register_forward_hook(lambda *_: seen.append(1))
        gradients(model, batch())
        num_chunks = -(-batch()["input_ids"].shape[1] // 7)
        assert len(seen) == 2 * num_chunks


def test_a_hook_that_trains_something_else_is_refused() -> None:
    """As of a steering vector that is learnt: the group does not know of it."""
    trained = nn.Parameter(V.clone())
    model = model_with(forward_hook, lambda x: x + trained)
    model.requires_grad_(False)
    with pytest.raises(UnsupportedModelError, match="trains 1 tensors that are no parameters of its layer"):
        model(**batch())


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
def test_a_weight_that_is_another_one_at_each_call(norm: Any) -> None:
    model = chunk_model(tiny_llama(num_layers=2), CONFIG)
    norm(model.model.layers[1].mlp.up_proj)
    with pytest.raises(UnsupportedModelError, match="up_proj of layer 1"):
        model(**batch())


def test_a_backward_hook_that_mixes_gradients() -> None:
    def place(layer: Any, change: Change) -> None:
        layer.mlp.register_full_backward_hook(lambda module, grads, _: (change(grads[0]),))

    with pytest.raises(UnsupportedModelError, match="backward hook"):
        model_with(place, norm_of_all)(**batch())
    plain = tiny_llama(num_layers=2)
    place(plain.model.layers[1], bounded)
    found = gradients(model_with(place, bounded), batch())
    assert largest_difference(found, gradients(plain, batch())) < 1e-10


def test_a_global_hook() -> None:
    def edit(module: nn.Module, args: Any, output: Any) -> Any:
        return last_position(output) if type(module).__name__ == "LlamaMLP" else None

    model = chunk_model(tiny_llama(num_layers=2), CONFIG)
    handle = torch_module.register_module_forward_hook(edit)
    try:
        with pytest.raises(UnsupportedModelError, match=r"global hook edit"):
            model(**batch())
    finally:
        handle.remove()
    gradients(model, batch())


@pytest.mark.parametrize("kind", [LlamaMLP, LlamaDecoderLayer])
@pytest.mark.parametrize("change", [mean_of_tokens, bounded])
def test_a_forward_set_on_the_class_after_chunking(
    kind: Any, change: Change, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, plain, forward = (
        chunk_model(tiny_llama(num_layers=2), CONFIG),
        tiny_llama(num_layers=2),
        kind.forward,
    )
    monkeypatch.setattr(kind, "forward", lambda self, x, **kwargs: change(forward(self, x, **kwargs)))
    if change is mean_of_tokens:
        with pytest.raises(UnsupportedModelError, match=f"{kind.__name__}|mlp"):
            model(**batch())
    else:
        assert largest_difference(gradients(model, batch()), gradients(plain, batch())) < 1e-10


def test_a_norm_of_the_users_runs_whole() -> None:
    """The model's own runs in chunks, as no hook and no module inside of it does."""

    def model() -> Any:
        result = tiny_llama(num_layers=2)
        result.model.norm = Around(result.model.norm, mean_of_tokens)
        return result

    found = gradients(chunk_model(model(), CONFIG), batch())
    assert largest_difference(found, gradients(model(), batch())) < 1e-10


def test_experts_get_tokens_by_their_choice() -> None:
    """A hook gets as many tokens as a router sends."""

    class Chosen(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            chosen = x[..., 0] > 0
            out = torch.zeros_like(x)
            out[chosen] = self.inner(x[chosen])
            return out

    def model(change: Change | None) -> Any:
        result = tiny_llama(num_layers=2)
        layer = result.model.layers[1]
        layer.mlp = Chosen(layer.mlp)
        if change is not None:
            layer.mlp.inner.register_forward_hook(lambda module, args, output: change(output))
        return result

    inputs = batch(num_rows=2)
    for change in (None, steered):
        found = gradients(chunk_model(model(change), CONFIG), inputs)
        assert largest_difference(found, gradients(model(change), inputs)) < 1e-10
    with pytest.raises(UnsupportedModelError, match="looks at other tokens"):
        chunk_model(model(lambda x: x - x.mean(0)), CONFIG)(**inputs)


def test_lora_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(additions, "LayerProbe", None)
    monkeypatch.setattr(additions, "HookNotes", None)
    gradients(chunk_model(with_lora(tiny_llama(num_layers=2)), CONFIG), batch())


class MeanRouted(nn.Module):
    """An adapter whose router looks at the mean over tokens. It begins with no effect, as PEFT's do."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.router = nn.Linear(base.in_features, 2, bias=False, dtype=torch.float64)
        self.down = nn.Linear(base.in_features, 4, bias=False, dtype=torch.float64)
        self.up = nn.ModuleList(nn.Linear(4, base.out_features, bias=False).double() for _ in range(2))
        for module in (self.router, *self.up):
            nn.init.zeros_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.router(x.mean(1)).softmax(-1)
        parts = [up(self.down(x)) * weights[:, None, i, None] for i, up in enumerate(self.up)]
        result: Tensor = self.base(x) + sum(parts)
        return result


def test_an_adapter_that_has_no_effect_yet() -> None:
    def place(layer: Any, change: Change) -> None:
        layer.mlp.up_proj = MeanRouted(layer.mlp.up_proj)

    with pytest.raises(UnsupportedModelError, match=r"test_additions\.MeanRouted, mlp\.up_proj of layer 1"):
        model_with(place, steered)(**batch())


@pytest.mark.parametrize("place", [forward_hook, module_around, forward_set])
def test_the_gradient_check_refuses(place: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    for change in (last_position, mean_of_tokens, token_before):
        model = tiny_llama(num_layers=2, dtype=torch.float32, initializer_range=0.1)
        place(model.model.layers[1], change)
        with pytest.raises(UnsupportedModelError):
            check_gradients(model, batch(num_tokens=60), CONFIG)
        assert not any("chunkdist" in key for key in model.__dict__), "unchunked again"
    model = tiny_llama(num_layers=2, dtype=torch.float32, initializer_range=0.1)
    place(model.model.layers[1], steered)
    assert check_gradients(model, batch(num_tokens=60), CONFIG).passed
