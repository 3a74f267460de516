"""A chunked model in a program: steps, hooks, evaluation, generation, failures, and the way back."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from chunkdist import ChunkConfig, UnsupportedModelError, chunk_model, unchunk_model
from chunkdist.chunking import chunk_report
from chunkdist.stores.kv_store import KVStore
from tests.helpers.models import (
    batch,
    gradients,
    largest_difference,
    packed_batch,
    padded_batch,
    tiny_llama,
    with_lora,
)

CONFIG = ChunkConfig(chunk_size=7)
EXACT = 1e-10


@pytest.mark.parametrize("height", [1, 2, "all"])
@pytest.mark.parametrize("retained", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("chunk_size", [3, 40])
def test_a_parameters_hooks_fire_once_a_backward(
    height: Any, retained: int, dtype: torch.dtype, chunk_size: int
) -> None:
    config = ChunkConfig(chunk_size=chunk_size, layers_per_group=height, retained_chunks=retained)
    model = chunk_model(tiny_llama(dtype=dtype), config)
    calls: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda grad, name=name: calls.update({name: calls.get(name, 0) + 1}))
        parameter.register_post_accumulate_grad_hook(
            lambda p, name=name: calls.update({name: calls.get(name, 0) + 10})
        )
    gradients(model, batch())
    assert calls == {name: 11 for name, _ in model.named_parameters()}


def test_two_models_in_one_process_that_share_a_config_object() -> None:
    first = tiny_llama()
    second = type(first)(first.config).double().train()
    plain = type(first)(first.config).double().train()
    second.load_state_dict(tiny_llama(seed=1).state_dict())
    plain.load_state_dict(tiny_llama(seed=1).state_dict())
    chunk_model(first, CONFIG)
    chunk_model(second, ChunkConfig(chunk_size=5, layers_per_group=2))
    losses = [first(**batch()).loss, second(**batch(seed=1)).loss]
    sum(losses).backward()  # both graphs alive, one backward
    assert largest_difference(_grads(first, losses[0]), gradients(tiny_llama(), batch())) < EXACT
    assert largest_difference(_grads(second, losses[1]), gradients(plain, batch(seed=1))) < EXACT


def test_gradient_accumulation_and_several_forwards_before_a_backward() -> None:
    def accumulated(model: nn.Module) -> dict[str, torch.Tensor]:
        model.zero_grad()
        for seed in range(2):
            model(**batch(seed=seed), use_cache=False).loss.backward()
        losses = [model(**batch(seed=seed, num_tokens=20 + seed), use_cache=False).loss for seed in (2, 3)]
        loss = sum(losses)
        loss.backward()
        return _grads(model, loss)

    assert (
        largest_difference(accumulated(chunk_model(tiny_llama(), CONFIG)), accumulated(tiny_llama())) < EXACT
    )


@pytest.mark.parametrize(
    "config", [CONFIG, ChunkConfig(chunk_size=7, layers_per_group="all", retained_chunks=1)]
)
def test_backward_twice(config: ChunkConfig) -> None:
    model = chunk_model(tiny_llama(), config)
    loss = model(**batch()).loss
    loss.backward(retain_graph=True)
    once = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, once[name], rtol=1e-12, atol=1e-14)


def test_evaluation_between_steps() -> None:
    plain, model = tiny_llama(), chunk_model(tiny_llama(), CONFIG)
    expected = gradients(plain, batch())
    with torch.no_grad():
        for inputs in (batch(seed=5), packed_batch([9, 20]), padded_batch([20, 11])):
            output, truth = model.eval()(**inputs), plain.eval()(**inputs, use_cache=False)
            torch.testing.assert_close(output.loss, truth.loss)
            seen = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
            torch.testing.assert_close((output.logits * 1)[seen], truth.logits[seen])
            without_labels = {key: x for key, x in inputs.items() if key != "labels"}
            torch.testing.assert_close(model(**without_labels).logits[seen], truth.logits[seen])
    assert largest_difference(gradients(model.train(), batch()), expected) < EXACT


def test_evaluation_keeps_nothing() -> None:
    stores: list[weakref.ref[KVStore]] = []
    model = chunk_model(tiny_llama(), CONFIG).eval()
    real_init = KVStore.__init__

    def init(self: KVStore, *args: Any) -> None:
        stores.append(weakref.ref(self))
        real_init(self, *args)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(KVStore, "__init__", init)
        model(**batch())
    gc.collect()
    assert stores
    assert all(store() is None for store in stores)


def test_generation_is_the_models_own() -> None:
    plain, model = tiny_llama(), chunk_model(tiny_llama(), CONFIG)
    gradients(model, batch())
    prompt = batch(num_tokens=12)["input_ids"]
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = plain.eval().generate(prompt, **settings)
    assert torch.equal(model.eval().generate(prompt, **settings), expected)
    left_padded = torch.ones_like(prompt)
    left_padded[:, :3] = 0
    model.generate(prompt, attention_mask=left_padded, **settings)  # no chunks, no refusal
    assert largest_difference(gradients(model.train(), batch()), gradients(plain.train(), batch())) < EXACT


@pytest.mark.parametrize("has_grad", [True, False])
@pytest.mark.parametrize("make", [tiny_llama, lambda: with_lora(tiny_llama())], ids=["full", "LoRA"])
def test_generation_in_training_mode(make: Any, has_grad: bool) -> None:
    """As trainers that sample in a step do; the step after it is exact."""
    plain, model = make().train(), chunk_model(make(), CONFIG).train()
    prompt = batch(num_rows=2, num_tokens=12)["input_ids"]
    mask = torch.ones_like(prompt)
    mask[1, :4] = 0  # left padding
    settings = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with torch.set_grad_enabled(has_grad):
        expected, found = (x.generate(input_ids=prompt, **settings) for x in (plain, model))
    assert torch.equal(found, expected)
    assert model.training
    assert largest_difference(gradients(model, batch()), gradients(plain, batch())) < EXACT


def test_a_forward_with_a_cache_in_training_mode() -> None:
    """Without a graph it is the model's own; with one, what the caller passed is named."""
    from transformers import DynamicCache

    plain, model = tiny_llama(), chunk_model(tiny_llama(), CONFIG)
    ids = batch()["input_ids"]
    with torch.no_grad():
        expected, found = (x(ids, past_key_values=DynamicCache()) for x in (plain, model))
        torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=0)
        assert found.past_key_values.get_seq_length() == 37
        torch.testing.assert_close(model(ids, use_cache=True).logits, expected.logits, rtol=0, atol=0)
    with pytest.raises(ValueError, match="past_key_values was passed while training"):
        model(ids, past_key_values=DynamicCache())


def test_prefix_tuning_is_refused_with_what_to_take_instead() -> None:
    from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model

    def model(config: type) -> Any:
        torch.manual_seed(0)
        return get_peft_model(tiny_llama(), config(task_type="CAUSAL_LM", num_virtual_tokens=4)).double()

    with pytest.raises(ValueError, match="take LoraConfig or PromptTuningConfig"):
        chunk_model(model(PrefixTuningConfig), CONFIG)(**batch())
    found = gradients(chunk_model(model(PromptTuningConfig), CONFIG), batch())
    assert largest_difference(found, gradients(model(PromptTuningConfig), batch())) < EXACT


@pytest.mark.parametrize("phase", ["forward", "backward"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError])
@pytest.mark.parametrize("height", [1, 2])
def test_an_exception_in_the_middle_of_a_step(phase: str, error: type[BaseException], height: int) -> None:
    model = chunk_model(tiny_llama(), ChunkConfig(chunk_size=7, layers_per_group=height, retained_chunks=1))
    names = dict(model.named_parameters())
    failing = model.model.layers[1].mlp.down_proj
    own_forward, armed = failing.forward, phase == "forward"

    def fail_once(x: torch.Tensor) -> torch.Tensor:
        nonlocal armed
        if armed:
            armed = False
            raise error("planted")
        return own_forward(x)

    failing.forward = fail_once
    loss = None
    try:
        loss = model(**batch()).loss
        armed = True
        loss.backward()
    except error:
        pass
    else:
        pytest.fail("the planted error was lost")
    loss = None
    del failing.forward
    assert dict(model.named_parameters()) == names, "the parameters are back in their places"
    assert model.config._attn_implementation == "plain"
    assert largest_difference(gradients(model, batch()), gradients(tiny_llama(), batch())) < EXACT
    if phase == "backward":
        assert _num_live_stores() == 0


def test_nothing_is_left_after_a_step() -> None:
    model = chunk_model(tiny_llama(), ChunkConfig(chunk_size=7, layers_per_group=2))
    loss = model(**batch()).loss
    assert _num_live_stores() == 4
    loss.backward()
    assert _num_live_stores() == 0, "K/V wait for the backward, and no longer, even while the loss is alive"


@pytest.mark.parametrize("height", [1, 2])
def test_the_random_numbers_of_dropout_are_replayed(height: int) -> None:
    """With dropout, a rerun is the forward that gave the loss: the same gradients as when all graphs are kept
    from it."""

    def grads(retained: int) -> dict[str, torch.Tensor]:
        config = ChunkConfig(chunk_size=7, layers_per_group=height, retained_chunks=retained)
        model = chunk_model(with_lora(tiny_llama(), lora_dropout=0.5), config)
        torch.manual_seed(3)
        result = gradients(model, batch())
        result["random"] = torch.rand(3)
        return result

    kept, rerun = grads(1000), grads(0)
    assert torch.equal(kept.pop("random"), rerun.pop("random")), "the backward leaves the generator as it was"
    assert largest_difference(rerun, kept) < EXACT
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("chunkdist.replay.RngState.restore", lambda self: None)
        with pytest.raises(UnsupportedModelError, match="came to other hidden states when it was run again"):
            grads(0)


def test_autocast_is_replayed() -> None:
    inputs = batch(num_tokens=64)
    losses = {}
    for name, model in {
        "plain": tiny_llama(dtype=torch.float32, initializer_range=0.1, attn_implementation="sdpa"),
        "chunked": chunk_model(
            tiny_llama(dtype=torch.float32, initializer_range=0.1), ChunkConfig(chunk_size=16)
        ),
    }.items():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**inputs, use_cache=False).loss
        loss.backward()
        losses[name] = torch.cat([p.grad.flatten() for p in model.parameters()])
        seen = model.model.layers[0].mlp.gate_proj.weight.grad.dtype
        assert seen == torch.float32
    truth = gradients(tiny_llama(dtype=torch.float64, initializer_range=0.1), inputs)
    truth_grad = torch.cat([g.flatten() for name, g in truth.items() if name != "loss"])
    plain_error, error = ((losses[name] - truth_grad).norm() for name in ("plain", "chunked"))
    assert error < 1.1 * plain_error
    assert error > 1e-4 * truth_grad.norm(), "autocast was on"


def test_unchunk_leaves_no_trace() -> None:
    model, untouched = tiny_llama(), tiny_llama()
    before = {name: set(module.__dict__) for name, module in model.named_modules()}
    keys = list(model.state_dict())
    chunk_model(model, CONFIG)
    assert list(model.state_dict()) == keys
    gradients(model, batch())
    assert unchunk_model(model) is model
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    gradients(untouched, batch())
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == before
    inputs = batch()
    assert all(
        torch.equal(x, y)
        for x, y in zip(gradients(model, inputs).values(), gradients(untouched, inputs).values(), strict=True)
    )
    chunk_model(model, CONFIG)
    with pytest.raises(ValueError, match="chunked already"):
        chunk_model(model, CONFIG)


def test_a_copied_model_is_its_own() -> None:
    model = chunk_model(tiny_llama(), CONFIG)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert largest_difference(gradients(twin, batch()), gradients(tiny_llama(), batch())) < EXACT
    unchunk_model(twin)
    assert chunk_report(model).chunk_size == 7


def test_lora_after_chunking() -> None:
    chunked = with_lora(
        chunk_model(tiny_llama(), CONFIG), modules_to_save=["embed_tokens", "lm_head", "norm"]
    )
    plain = with_lora(tiny_llama(), modules_to_save=["embed_tokens", "lm_head", "norm"])
    assert largest_difference(gradients(chunked, batch()), gradients(plain, batch())) < EXACT
    unchunk_model(chunked)


def test_saving_and_loading(tmp_path: Any) -> None:
    model = chunk_model(tiny_llama(), CONFIG)
    gradients(model, batch())
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="plain", dtype=torch.float64)
    assert largest_difference(gradients(loaded.train(), batch()), gradients(model, batch())) < EXACT


def test_report() -> None:
    model = chunk_model(tiny_llama(), ChunkConfig(chunk_size=7, layers_per_group=3))
    assert (chunk_report(model).num_groups, chunk_report(model).rebuilds_kv) == (2, False)
    assert chunk_report(model).attention == "auto"
    gradients(model, batch())
    assert chunk_report(model).attention == "cpu_flash"
    assert "first" in chunk_report(model).attention_reason


def refused_training(model: Any, **inputs: Any) -> None:
    gradients(chunk_model(model, CONFIG), {**batch(), **inputs})


def test_refusals_while_training() -> None:
    from transformers import DynamicCache

    with pytest.raises(ValueError, match="first token behind left padding"):  # it has a label
        refused_training(tiny_llama(), attention_mask=torch.tensor([[0] * 3 + [1] * 34]))
    with pytest.raises(ValueError, match="gap"):
        refused_training(tiny_llama(), attention_mask=torch.tensor([[1] * 10 + [0] * 3 + [1] * 24]))
    with pytest.raises(ValueError, match="custom masks"):
        refused_training(tiny_llama(), attention_mask=torch.ones(1, 1, 37, 37, dtype=torch.bool))
    with pytest.raises(ValueError, match="past_key_values was passed while training"):
        refused_training(tiny_llama(), past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="use_cache=True was passed while training"):
        chunk_model(tiny_llama(), CONFIG)(**batch(), use_cache=True)
    with pytest.raises(ValueError, match="output_attentions"):
        refused_training(tiny_llama(), output_attentions=True)
    with pytest.raises(ValueError, match="cu_seq_lens_q"):
        refused_training(tiny_llama(), cu_seq_lens_q=torch.tensor([0, 5, 40]))
    with pytest.raises(UnsupportedModelError, match="dropout"):
        refused_training(tiny_llama(attention_dropout=0.1))


def test_arguments_that_no_kernel_reads_pass_through() -> None:
    """A batch's extra columns reach the attention; what a kernel knows is refused."""
    extra = {"margin": torch.tensor([0.5]), "note": "words", "ids_again": batch()["input_ids"]}
    found = gradients(chunk_model(tiny_llama(), CONFIG), {**batch(), **extra})
    assert largest_difference(found, gradients(tiny_llama(), batch())) < EXACT
    with pytest.raises(UnsupportedModelError, match="passes position_bias to its attention"):
        refused_training(tiny_llama(), position_bias=torch.zeros(1, 4, 1, 37))


def test_refusals_when_chunking() -> None:
    with pytest.raises(ValueError, match="layers_per_group=5, but the model has 4 layers"):
        chunk_model(tiny_llama(), ChunkConfig(chunk_size=7, layers_per_group=5))
    with pytest.raises(ValueError, match="not a transformers model"):
        chunk_model(nn.Linear(2, 2), CONFIG)
    with pytest.raises(ValueError, match="not chunked"):
        unchunk_model(tiny_llama())
    model = tiny_llama()
    with pytest.raises(UnsupportedModelError, match="cannot run this model"):
        gradients(chunk_model(model, ChunkConfig(chunk_size=7, attention="varlen")), batch())


def _grads(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **grads}


def _num_live_stores() -> int:
    gc.collect()
    return sum(isinstance(x, KVStore) and x._kv is not None for x in gc.get_objects())


@pytest.mark.parametrize("saved", ["norm", "lm_head", "input_layernorm"])
def test_modules_that_peft_trains_whole(saved: str) -> None:
    def model() -> Any:
        return with_lora(tiny_llama(), modules_to_save=[saved])

    truth = gradients(model(), batch())
    for config in (
        ChunkConfig(chunk_size=7),
        ChunkConfig(chunk_size=7, layers_per_group=2, retained_chunks=1),
    ):
        chunked = chunk_model(model(), config)
        assert largest_difference(gradients(chunked, batch()), truth) < 1e-6
        assert chunk_report(chunked).head_tile_tokens is not None


def test_an_adapter_on_the_head_makes_all_logits_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model = chunk_model(with_lora(tiny_llama(), target_modules=["lm_head"]), ChunkConfig(chunk_size=7))
    assert "the logits of the whole sequence will be made" in caplog.text
    assert chunk_report(model).head_tile_tokens is None
    truth = gradients(with_lora(tiny_llama(), target_modules=["lm_head"]), batch())
    assert largest_difference(gradients(model, batch()), truth) < 1e-6


@pytest.mark.parametrize("height", [1, 2])
def test_evaluation_in_inference_mode(height: int) -> None:
    model = tiny_llama()
    expected = model(**batch(), use_cache=False).loss
    chunk_model(model, ChunkConfig(chunk_size=7, layers_per_group=height))
    with torch.inference_mode():
        torch.testing.assert_close(model(**batch(), use_cache=False).loss, expected.detach())
    assert largest_difference(gradients(model, batch()), gradients(tiny_llama(), batch())) < 1e-6


def test_pickling_is_refused() -> None:
    with pytest.raises(TypeError, match="cannot be pickled: call unchunk_model first"):
        pickle.dumps(chunk_model(tiny_llama(), ChunkConfig(chunk_size=7)))


def test_logits_under_autocast_are_what_they_were_there() -> None:
    model = chunk_model(tiny_llama(dtype=torch.float32), ChunkConfig(chunk_size=7))
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(**batch(), use_cache=False).logits
    assert logits.dtype == (logits + 0).dtype == torch.bfloat16
