"""Host offload changes no bit of a gradient, gives memory back, and never trains on what is stale."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from chunkdist import ChunkConfig, IndependentSampler, chunk_model
from chunkdist.chunking import host_memory
from chunkdist.stores import host_memory as offload_module
from chunkdist.stores.host_memory import Copies, HostMemory, HostTensor
from chunkdist.stores.state_relay import StateStore
from tests.helpers.hybrids import model_of
from tests.helpers.models import batch, gradients, packed_batch, padded_batch, tiny_llama
from tests.helpers.steps import (
    BUILDS,
    accumulated,
    evaluated_between,
    two_forwards,
    under_autocast,
    without_backward,
)

INPUTS: dict[str, Callable[[], dict[str, Tensor]]] = {
    "right-padded rows": lambda: padded_batch([30, 20]),
    "packed, several runs": lambda: packed_batch([7, 14, 5, 2]),
}
SCHEDULES: dict[str, dict[str, Any]] = {
    "SeCO": {},
    "K/V kept": {"rebuild_kv": False},
    "groups of 2": {"layers_per_group": 2},
    "groups of 2, K/V rebuilt": {"layers_per_group": 2, "rebuild_kv": True},
    "one group": {"layers_per_group": "all"},
    "K/V kept, retained": {"retained_chunks": 2},
    "all retained": {"retained_chunks": 100},
    "retained, groups of 2": {"retained_chunks": 1, "layers_per_group": 2},
    "SpaCO": {"sampler": IndependentSampler(budget=3)},
    "SpaCO, K/V kept": {"sampler": IndependentSampler(budget=3), "rebuild_kv": False},
    "SpaCO, retained": {"sampler": IndependentSampler(budget=3), "retained_chunks": 2},
    "attention kept": {"keep_attention": True},
    "groups of 2, attention kept": {"layers_per_group": 2, "rebuild_kv": True, "keep_attention": True},
    "retained, attention kept": {"retained_chunks": 2, "keep_attention": True},
    "SpaCO, attention kept": {"sampler": IndependentSampler(budget=3), "keep_attention": True},
}


def chunked(model: nn.Module, offload: str, **schedule: Any) -> nn.Module:
    settings = {"chunk_size": 7, "offload": offload, "keep_attention": False, **schedule}
    return chunk_model(model, ChunkConfig(**settings))  # type: ignore[arg-type]


def memory_of(model: nn.Module) -> HostMemory:
    memory = host_memory(model)
    assert memory is not None
    return memory


def assert_same_bits(
    build: Callable[[], nn.Module],
    steps: Callable[[nn.Module], dict[str, Tensor]],
    schedule: dict[str, Any],
    *,
    waits: bool = True,
) -> None:
    """`steps` with and without the host; afterwards nothing waits there."""
    results = []
    for offload in ("none", "host"):
        model = chunked(build(), offload, **schedule)
        torch.manual_seed(3)
        results.append(steps(model))
    plain, offloaded = results
    assert plain.keys() == offloaded.keys()
    assert len(plain) > 1
    assert all(torch.equal(plain[name], offloaded[name]) for name in plain)
    memory = memory_of(model)
    assert (memory.held_bytes > 0) is waits
    assert memory.used_bytes == 0


@pytest.mark.parametrize(
    ("schedule", "inputs"),
    [(schedule, "packed, several runs") for schedule in SCHEDULES]
    + [
        (schedule, "right-padded rows")
        for schedule in ("K/V kept", "groups of 2, K/V rebuilt", "SpaCO", "groups of 2, attention kept")
    ],
)
def test_no_bit_changes(schedule: str, inputs: str) -> None:
    height = SCHEDULES[schedule].get("layers_per_group", 1)
    assert_same_bits(
        lambda: tiny_llama(num_layers=4 if height == 2 else 2),
        lambda model: gradients(model, INPUTS[inputs]()),
        SCHEDULES[schedule],
        waits=height != "all",
    )


@pytest.mark.parametrize("schedule", [{}, {"retained_chunks": 2, "keep_attention": True}])
def test_states_of_hybrid_models(schedule: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[bool] = []
    real_send = StateStore.send

    def send(self: StateStore, position: int, host: HostMemory) -> None:
        real_send(self, position, host)
        sent.extend(isinstance(x, HostTensor) for x in self._tensors[position].values())

    monkeypatch.setattr(StateStore, "send", send)
    ids = torch.randint(0, 50, (1, 30), generator=torch.Generator().manual_seed(0))
    model = model_of("Qwen3_5ForCausalLM")
    assert_same_bits(
        lambda: copy.deepcopy(model).train(),
        lambda model: gradients(model, {"input_ids": ids, "labels": ids}),
        schedule,
    )
    assert len(sent) >= 4 * 2, "two states at the start of each chunk but the first"
    assert all(sent)


STEPS: dict[str, tuple[str, str, Callable[[nn.Module], dict[str, Tensor]]]] = {
    "LoRA": ("LoRA", "SeCO", lambda model: gradients(model, batch())),
    "dropout": ("dropout", "SeCO", lambda model: gradients(model, batch())),
    "bf16": ("bf16", "K/V kept", lambda model: gradients(model, batch())),
    "autocast": ("fp32", "K/V kept", under_autocast),
    "attention kept": ("dropout", "attention kept", accumulated),
    "accumulation": ("fp32", "K/V kept", accumulated),
    "two forwards before a backward": ("dropout", "K/V kept, retained", two_forwards),
    "an evaluation between": ("fp32", "K/V kept", evaluated_between),
    "forwards without a backward": ("fp32", "SeCO", without_backward),
    "retained, without a backward": ("fp32", "K/V kept, retained", without_backward),
    "attention kept, without a backward": ("fp32", "attention kept", without_backward),
}


@pytest.mark.parametrize("name", STEPS)
def test_no_bit_changes_in(name: str) -> None:
    build, schedule, steps = STEPS[name]
    assert_same_bits(BUILDS[build], steps, SCHEDULES[schedule])


@pytest.mark.parametrize("schedule", ["SeCO", "K/V kept, retained", "attention kept"])
def test_a_step_that_fails_leaves_nothing(schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the forward and in the backward; the next step is right."""
    expected = gradients(chunked(tiny_llama(num_layers=2), "none", **SCHEDULES[schedule]), batch())
    model: Any = chunked(tiny_llama(num_layers=2), "host", **SCHEDULES[schedule])
    memory = memory_of(model)
    mlp = model.model.layers[0].mlp
    failing_call = 0
    real, calls = mlp.forward, []

    def failing(x: Tensor) -> Tensor:
        calls.append(x)
        if len(calls) == failing_call:
            raise ValueError("a fault")
        return real(x)

    mlp.forward = failing
    for call in (4, 8):  # of six chunks: in the forward, and in the backward
        failing_call = call
        calls.clear()
        with pytest.raises(ValueError, match="a fault"):
            gradients(model, batch())
        calls.clear()
        gc.collect()  # tracebacks are cycles
        assert memory.used_bytes == 0
    failing_call = 0
    found = gradients(model, batch())
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("schedule", ["SeCO", "K/V kept", "groups of 2", "attention kept"])
@pytest.mark.parametrize(
    "fault", ["a copy out is skipped", "a copy back is skipped", "a slab is given twice"]
)
def test_stale_memory_is_an_error(fault: str, schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the second step, whose slabs hold what the first has left there."""
    model = chunked(tiny_llama(), "host", **SCHEDULES[schedule])
    gradients(model, batch())
    pools = memory_of(model)._pools.values()
    blocks = [block.memory.untyped_storage().data_ptr() for pool in pools for block in pool._blocks]
    real_run, real_take, num_runs = Copies.run, offload_module._Pool.take, []

    def run(self: Copies, target: Tensor, source: Tensor) -> Any:
        outward = target.untyped_storage().data_ptr() in blocks
        num_runs.append(outward)
        if outward == ("out" in fault) and num_runs.count(outward) == 3:
            return None
        return real_run(self, target, source)

    def take(self: Any, num_bytes: int) -> Any:
        slab = real_take(self, num_bytes)
        self.give_back(slab)
        return slab

    if fault == "a slab is given twice":
        monkeypatch.setattr(offload_module._Pool, "take", take)
    else:
        monkeypatch.setattr(Copies, "run", run)
    with pytest.raises(RuntimeError, match="is not what went there"):
        gradients(model, batch(seed=1))


def test_a_copy_that_fails_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(self: Copies, target: Tensor, source: Tensor) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access")

    model = chunked(tiny_llama(num_layers=2), "host")
    monkeypatch.setattr(Copies, "run", run)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        gradients(model, batch())
    gc.collect()
    assert memory_of(model).used_bytes == 0


def test_a_second_backward_is_an_error() -> None:
    model = chunked(tiny_llama(num_layers=2), "host")
    loss = model(**batch(), use_cache=False).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="call backward once, or write offload='none'"):
        loss.backward()
