"""Hooks on the output layer get what they get in the plain model; engines' own cost nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from chunkdist import ChunkConfig, chunk_model
from chunkdist.loss.head_hooks import foreign_hook
from chunkdist.loss.lazy_logits import _warn
from chunkdist.loss.lazy_tensor import LazyLogits
from tests.helpers.models import VOCAB_SIZE, batch, gradients, largest_difference, tiny_llama, with_lora

INPUTS = batch(num_rows=2, num_tokens=21)
SHAPE = (2, 21, VOCAB_SIZE)


def forward_hook(head: nn.Module) -> Any:
    def halve(module: nn.Module, inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        assert logits.shape == SHAPE
        return logits * 0.5

    return head.register_forward_hook(halve)


def in_place_hook(head: nn.Module) -> Any:
    def forbid(module: nn.Module, inputs: Any, logits: torch.Tensor) -> None:
        logits[..., 50:].mul_(0.1)

    return head.register_forward_hook(forbid)


def pre_hook(head: nn.Module) -> Any:
    return head.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))


def backward_hook(head: nn.Module) -> Any:
    def double(module: nn.Module, grad_inputs: Any, grad_outputs: Any) -> Any:
        assert grad_outputs[0].shape == SHAPE
        return (grad_inputs[0] * 2,)

    return head.register_full_backward_hook(double)


def backward_pre_hook(head: nn.Module) -> Any:
    return head.register_full_backward_pre_hook(lambda module, grads: (grads[0] * 3,))


def hook_on_all_modules(head: nn.Module) -> Any:
    def halve(module: nn.Module, inputs: Any, output: Any) -> Any:
        return output * 0.5 if isinstance(module, nn.Linear) and module.out_features == VOCAB_SIZE else None

    return register_module_forward_hook(halve)


HOOKS = [forward_hook, in_place_hook, pre_hook, backward_hook, backward_pre_hook, hook_on_all_modules]


@contextmanager
def hooked(model: Any, hook: Callable[[nn.Module], Any], **inputs: Any) -> Iterator[dict[str, Any]]:
    handle = hook(model.get_output_embeddings())
    try:
        yield gradients(model, INPUTS)
    finally:
        handle.remove()


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("hook", HOOKS)
def test_they_see_the_logits(hook: Callable[[nn.Module], Any], wrapped: bool) -> None:
    def make() -> Any:
        model = tiny_llama(num_layers=1)
        return with_lora(model, modules_to_save=["lm_head"], target_modules=["q_proj"]) if wrapped else model

    found = []
    model = chunk_model(make(), ChunkConfig(chunk_size=8))
    for one in (make(), model):
        with hooked(one.get_base_model() if wrapped else one, hook) as grads:
            found.append(grads)
    expected, chunked = found
    assert largest_difference(chunked, expected) < 1e-10
    logits = model(**INPUTS).logits
    assert isinstance(logits, LazyLogits), "the hook is gone"


def test_one_that_was_there_before(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_llama(num_layers=1)
    with hooked(model, forward_hook) as expected:
        chunk_model(model, ChunkConfig(chunk_size=8))
        assert largest_difference(gradients(model, INPUTS), expected) < 1e-10
    assert "the logits of the whole sequence will be made: a hook on the output layer" in caplog.text


def test_one_line_says_what_it_costs(caplog: pytest.LogCaptureFixture) -> None:
    _warn.cache_clear()
    model = chunk_model(tiny_llama(num_layers=1), ChunkConfig(chunk_size=8))
    gradients(model, INPUTS)
    assert caplog.text == ""
    for _ in range(2):
        with hooked(model, pre_hook):
            pass
    assert caplog.text.count("the logits of the whole sequence will be made") == 1
    assert "pre_hook" in caplog.text


def test_weights_that_a_hook_makes() -> None:
    model, plain = (tiny_llama(num_layers=1) for _ in range(2))
    chunk_model(model, ChunkConfig(chunk_size=8))
    for one in (model, plain):
        nn.utils.weight_norm(one.lm_head)
    assert largest_difference(gradients(model, INPUTS), gradients(plain, INPUTS)) < 1e-10


def test_logits_that_are_read_after_a_hook_came() -> None:
    model = chunk_model(tiny_llama(num_layers=1), ChunkConfig(chunk_size=8))
    logits = model(**INPUTS).logits
    forward_hook(model.lm_head)
    with pytest.raises(
        RuntimeError, match=r"a hook, forward_hook.<locals>.halve, was put on the output layer"
    ):
        logits.sum()


def test_hooks_of_engines() -> None:
    def gather(module: nn.Module, inputs: Any) -> None:
        return None

    head = nn.Linear(2, 2)
    head.register_forward_pre_hook(gather)
    assert foreign_hook([head]) == "test_hooks_of_engines.<locals>.gather"
    gather.__module__ = "deepspeed.runtime.zero.parameter_offload"
    assert foreign_hook([head]) is None
