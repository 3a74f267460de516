"""Kept attention outputs: no kernel runs twice, and no bit of a gradient changes."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from chunkdist import ChunkConfig, IndependentSampler, UnsupportedModelError, chunk_model
from chunkdist.attention.base import AttentionRow
from chunkdist.attention.cpu_flash import CpuFlashBackend
from chunkdist.attention.math import MathBackend
from chunkdist.stores.attention_outputs import AttentionOutputs
from tests.helpers.model_zoo import tiny_model
from tests.helpers.models import (
    batch,
    gradients,
    largest_difference,
    packed_batch,
    padded_batch,
    tiny_llama,
)
from tests.helpers.steps import BUILDS, accumulated, evaluated_between, two_forwards, under_autocast
from tests.helpers.sweep import double_precision
from tests.pipeline.stages_here import staged_step

INPUTS: dict[str, Callable[[], dict[str, Tensor]]] = {
    "one row": lambda: batch(num_tokens=37),
    "packed": lambda: packed_batch([5, 1, 17, 13, 1]),
    "right-padded rows": lambda: padded_batch([37, 20, 3]),
}
SCHEDULES: dict[str, dict[str, Any]] = {
    "SeCO": {},
    "K/V kept": {"rebuild_kv": False},
    "groups of 2": {"layers_per_group": 2},
    "groups of 3, K/V rebuilt": {"layers_per_group": 3, "rebuild_kv": True},
    "one group, K/V rebuilt": {"layers_per_group": "all", "rebuild_kv": True},
    "one group": {"layers_per_group": "all"},
    "one chunk": {"chunk_size": 1000},
    "retained": {"retained_chunks": 2, "layers_per_group": 2},
    "all retained": {"retained_chunks": 100},
    "SpaCO": {"sampler": IndependentSampler(budget=3), "rebuild_kv": False},
    "SpaCO, groups of 2": {
        "sampler": IndependentSampler(budget=3),
        "layers_per_group": 2,
        "rebuild_kv": True,
    },
}


def assert_same_bits(
    build: Callable[[], nn.Module], step: Callable[[nn.Module], dict[str, Tensor]], **schedule: Any
) -> None:
    """With and without kept outputs."""
    found = []
    for keeps in (False, True):
        model = chunk_model(build(), ChunkConfig(**{"chunk_size": 7, "keep_attention": keeps, **schedule}))
        torch.manual_seed(3)
        found.append(step(model))
    without, with_them = found
    assert without.keys() == with_them.keys()
    assert len(without) > 1
    assert all(torch.equal(without[name], with_them[name]) for name in without)


@contextmanager
def counted(backend: type = MathBackend) -> Iterator[list[str]]:
    """Calls of a kernel: `forward`, `backward`, and `again`, a forward in the course of a backward."""
    calls: list[str] = []
    real = {name: getattr(backend, name) for name in ("forward", "backward")}

    def counting(name: str) -> Any:
        def call(self: Any, row: AttentionRow, *args: Any) -> Any:
            in_backward = torch._C._current_graph_task_id() != -1
            calls.append("again" if name == "forward" and in_backward else name)
            return real[name](self, row, *args)

        return call

    try:
        for name in real:
            setattr(backend, name, counting(name))
        yield calls
    finally:
        for name, function in real.items():
            setattr(backend, name, function)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("attention", ["math", "cpu_flash"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_bit_changes(dtype: torch.dtype, attention: str, schedule: str) -> None:
    for inputs in INPUTS.values():
        assert_same_bits(
            lambda: tiny_llama(num_layers=3, dtype=dtype),
            lambda model, inputs=inputs: gradients(model, inputs()),  # type: ignore[misc]
            attention=attention,
            **SCHEDULES[schedule],
        )


STEPS: dict[str, tuple[str, str, Callable[[nn.Module], dict[str, Tensor]]]] = {
    "LoRA": ("LoRA", "SeCO", lambda model: gradients(model, batch())),
    "dropout": ("dropout", "groups of 2", lambda model: gradients(model, batch())),
    "autocast": ("fp32", "one group, K/V rebuilt", under_autocast),
    "accumulation": ("dropout", "SeCO", accumulated),
    "two forwards before a backward": ("dropout", "retained", two_forwards),
    "an evaluation between": ("fp32", "K/V kept", evaluated_between),
}


@pytest.mark.parametrize("offload", ["none", "host"])
@pytest.mark.parametrize("name", STEPS)
def test_no_bit_changes_in(name: str, offload: str) -> None:
    build, schedule, step = STEPS[name]
    assert_same_bits(BUILDS[build], step, offload=offload, **SCHEDULES[schedule])


@pytest.mark.parametrize(
    "name",
    [
        "GptOssForCausalLM",  # sinks, and windows in every other layer
        "Gemma2ForCausalLM",  # windows and soft-caps
        "DeepseekV3ForCausalLM",  # values narrower than keys
        "Qwen3_5ForCausalLM",  # layers that do not attend
    ],
)
@pytest.mark.parametrize("schedule", [{}, {"layers_per_group": 2, "rebuild_kv": True}])
def test_models(name: str, schedule: dict[str, Any]) -> None:
    ids = torch.randint(10, 60, (2, 30), generator=torch.Generator().manual_seed(0))
    assert_same_bits(
        lambda: tiny_model(name).train(),
        lambda model: gradients(model, {"input_ids": ids, "labels": ids}),
        attention="math",
        **schedule,
    )


@pytest.mark.parametrize("name", ["GptOssForCausalLM", "Qwen3_5ForCausalLM"])
@pytest.mark.parametrize("retained", [0, 2])
def test_cells_of_a_pipeline(name: str, retained: int) -> None:
    with double_precision():
        model = tiny_model(name)
        num_layers = model.config.num_hidden_layers
        cut = [range(1), range(1, num_layers)]
        without = staged_step(model, cut, retained_chunks=retained)
        with counted() as calls:
            with_them = staged_step(model, cut, retained_chunks=retained, keep_attention=True)
    assert all(torch.equal(without.grads[key], with_them.grads[key]) for key in without.grads)
    assert "again" not in calls


@pytest.mark.parametrize("offload", ["none", "host"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_kernel_runs_forward_twice(schedule: str, offload: str) -> None:
    """In a step: once for each layer and chunk, whatever the schedule."""
    settings = {"chunk_size": 7, "attention": "math", "offload": offload, **SCHEDULES[schedule]}
    model = chunk_model(tiny_llama(num_layers=4), ChunkConfig(keep_attention=True, **settings))
    inputs = batch(num_tokens=37)
    gradients(model, inputs)  # the first forward asks the model what it is
    with counted() as calls:
        gradients(model, inputs)
    num_chunks = -(-37 // settings["chunk_size"])
    assert calls.count("forward") == 4 * num_chunks
    assert "again" not in calls
    if "sampler" not in settings:
        assert calls.count("backward") == 4 * num_chunks


def test_windowed_layers_run_again_where_only_global_ones_are_kept() -> None:
    """And no bit changes: windows in every other layer."""
    ids = torch.randint(10, 60, (1, 30), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "labels": ids}
    found = []
    for keeps, again in ((True, 0), ("global", 5), (False, 10)):
        config = ChunkConfig(chunk_size=6, attention="math", keep_attention=keeps)  # type: ignore[arg-type]
        model = chunk_model(tiny_model("GptOssForCausalLM").train(), config)
        gradients(model, inputs)
        model.zero_grad()
        with counted() as calls:
            found.append(gradients(model, inputs))
        assert len(model.model.layers) == 2
        assert (calls.count("forward") + calls.count("again"), calls.count("again")) == (10 + again, again)
    assert all(torch.equal(x[name], found[0][name]) for x in found for name in found[0])


def test_without_kept_outputs_kernels_run_twice() -> None:
    """So the counting above would see it."""
    model = chunk_model(
        tiny_llama(num_layers=4), ChunkConfig(chunk_size=7, attention="cpu_flash", keep_attention=False)
    )
    gradients(model, batch(num_tokens=37))
    with counted(CpuFlashBackend) as calls:
        gradients(model, batch(num_tokens=37))
    assert calls.count("forward") == calls.count("again") == 4 * 6


def test_a_second_backward_is_as_the_first() -> None:
    """With `retain_graph`: the outputs are read again, each time for another graph."""
    model: Any = chunk_model(tiny_llama(), ChunkConfig(chunk_size=7, layers_per_group=2, keep_attention=True))
    expected = gradients(model, batch())
    model.zero_grad()
    loss = model(**batch(), use_cache=False).loss
    loss.backward(retain_graph=True)
    loss.backward()
    found = {name: p.grad / 2 for name, p in model.named_parameters()}
    assert largest_difference({**found, "loss": loss.detach()}, expected) < 1e-12


@pytest.mark.parametrize("retained", [0, 2])
def test_nothing_is_held_after_the_backward(retained: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the loss still lives; and without a backward, once it is gone."""
    held: list[weakref.ref[Any]] = []
    real = AttentionOutputs.write

    def write(self: AttentionOutputs, chunk: Any, out: Tensor, lse: Tensor) -> None:
        held.extend(weakref.ref(x.untyped_storage()) for x in (out, lse))
        real(self, chunk, out, lse)

    monkeypatch.setattr(AttentionOutputs, "write", write)
    settings = {"chunk_size": 7, "retained_chunks": retained}
    model: Any = chunk_model(tiny_llama(num_layers=2), ChunkConfig(keep_attention=True, **settings))
    gc.disable()
    try:
        loss = model(**batch(), use_cache=False).loss
        assert len(held) == 2 * 2 * (6 - retained)
        loss.backward()
        assert not [x for x in held if x() is not None]
        held.clear()
        loss = model(**batch(), use_cache=False).loss
        del loss
        assert held
        assert not [x for x in held if x() is not None]
    finally:
        gc.enable()


@pytest.mark.parametrize("fault", ["another chunk's", "another step's"])
def test_what_is_stale_is_an_error(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a wrong gradient: the rerun of a cell that takes what is not its own comes to something else."""
    before: dict[int, Any] = {}
    real_read = AttentionOutputs.read

    def read(self: AttentionOutputs, chunk: Any) -> Any:
        found = real_read(self, chunk)
        if found is None:
            return None
        key = id(self) if fault == "another chunk's" else chunk.start
        stale = before.get(key, found)
        before[key] = found
        return stale if stale[0].shape == found[0].shape else found

    model = chunk_model(tiny_llama(), ChunkConfig(chunk_size=7, keep_attention=True))
    monkeypatch.setattr(AttentionOutputs, "read", read)
    with pytest.raises(UnsupportedModelError, match="came to other hidden states"):
        [gradients(model, batch(seed=seed)) for seed in (0, 1)]


def test_a_layer_that_writes_into_what_it_is_given_is_refused() -> None:
    def halve(module: nn.Module, args: tuple[Tensor]) -> None:
        if not torch.is_grad_enabled():  # else autograd itself would refuse it, in the backward
            args[0].mul_(0.5)

    model: Any = chunk_model(tiny_llama(num_layers=2), ChunkConfig(chunk_size=7, keep_attention=True))
    gradients(model, batch())
    model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(halve)
    with pytest.raises(UnsupportedModelError, match="changes in place what its attention returns"):
        gradients(model, batch())
