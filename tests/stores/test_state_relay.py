"""Layers with state other than keys and values: gradients are those of the model, whatever the schedule."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from chunkdist import ChunkConfig, IndependentSampler, UnsupportedModelError, chunk_model
from chunkdist.engine import probe
from chunkdist.stores.kv_store import KVStore
from chunkdist.stores.state_relay import StateRelay, StateStore
from chunkdist.stream.stream import Chunk, cut_segments
from tests.helpers.hybrids import LAYER_TYPES, error_of
from tests.helpers.model_zoo import FIRST_PLAIN_TOKEN, VOCAB_SIZE, tiny_config, tiny_model
from tests.helpers.models import gradients, largest_difference, with_lora
from tests.helpers.sweep import NUM_TOKENS, double_precision, run_class

KINDS = {
    "delta rule": "Qwen3_5ForCausalLM",
    "state space, MLP and MoE": "NemotronHForCausalLM",
    "convolution": "Lfm2ForCausalLM",
    "attention and state space in one layer": "FalconH1ForCausalLM",
}
SCHEDULES: list[tuple[str, dict[str, Any]]] = [
    ("rows", {"chunk_size": 16, "layers_per_group": "all", "retained_chunks": 1}),
    ("packed", {"chunk_size": 5, "layers_per_group": 1, "retained_chunks": 2}),
    ("packed", {"chunk_size": 16, "layers_per_group": 2, "rebuild_kv": True}),
]
"""A part of the grid of tests/helpers/hybrids.py. The sweep runs all classes in chunks of 7."""


@pytest.mark.parametrize("chunk_size", [1, NUM_TOKENS])
def test_the_shortest_and_the_longest_chunk(chunk_size: int) -> None:
    assert error_of(KINDS["delta rule"], "rows", chunk_size=chunk_size, layers_per_group=2) < 1e-10


@pytest.mark.parametrize("name", KINDS.values(), ids=list(KINDS))
@pytest.mark.parametrize(("kind", "schedule"), SCHEDULES)
def test_exact(name: str, kind: str, schedule: dict[str, Any]) -> None:
    assert error_of(name, kind, **schedule) < 1e-10


def test_every_class_of_the_grid_is_known() -> None:
    assert set(LAYER_TYPES) <= probe.CLASSES


def test_chunks_end_where_segments_do() -> None:
    chunks = cut_segments((0, 3, 4, 15), 21, 5)
    assert [(c.start, c.end) for c in chunks] == [(0, 3), (3, 4), (4, 9), (9, 15), (15, 21)]
    assert [(c.start, c.end) for c in cut_segments((0,), 5, 1)] == [(0, 2), (2, 5)]


def ids(num_tokens: int, num_rows: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(FIRST_PLAIN_TOKEN, VOCAB_SIZE, (num_rows, num_tokens), generator=generator)
    return {"input_ids": input_ids, "labels": input_ids.clone()}


@pytest.mark.parametrize("layers_per_group", [1, "all"])
def test_lora(layers_per_group: Any) -> None:
    def model() -> Any:
        return with_lora(
            tiny_model("Qwen3_5ForCausalLM"), target_modules=["in_proj_qkv", "out_proj", "q_proj"]
        )

    with double_precision():
        truth = gradients(model(), ids(NUM_TOKENS))
        config = ChunkConfig(chunk_size=7, layers_per_group=layers_per_group, attention="math")
        assert largest_difference(gradients(chunk_model(model(), config), ids(NUM_TOKENS)), truth) < 1e-9


def test_evaluation_keeps_one_state_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """And its loss is the model's."""
    model = tiny_model("Qwen3_5ForCausalLM").float().eval()
    held: list[int] = []
    keep = StateStore.keep

    def noted(self: StateStore, position: int, states: Any) -> None:
        keep(self, position, states)
        held.append(len(self._tensors))

    monkeypatch.setattr(StateStore, "keep", noted)
    with torch.no_grad():
        truth = model(**ids(NUM_TOKENS), use_cache=False).loss
        chunk_model(model, ChunkConfig(chunk_size=7))
        torch.testing.assert_close(model(**ids(NUM_TOKENS), use_cache=False).loss, truth)
    assert set(held) == {1, 2}, "the one that the running chunk has begun with, and the one it has left"


def test_generation_is_the_models_own() -> None:
    model = tiny_model("Qwen3_5ForCausalLM").float().eval()
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    prompt = ids(12)["input_ids"]
    expected = model.generate(prompt, **settings)
    assert torch.equal(chunk_model(model, ChunkConfig(chunk_size=5)).generate(prompt, **settings), expected)


def test_bf16_is_as_near_to_the_truth_as_the_plain_model() -> None:
    """State gradients are in fp32, also over many chunks."""
    inputs = ids(61)

    def grads(dtype: torch.dtype, chunk_size: int | None) -> Tensor:
        model = tiny_model("Qwen3_5ForCausalLM").bfloat16().to(dtype)
        if chunk_size is not None:
            chunk_model(model, ChunkConfig(chunk_size=chunk_size, attention="math"))
        found = gradients(model, inputs)
        return torch.cat([g.double().flatten() for name, g in found.items() if name != "loss"])

    truth = grads(torch.float32, None)
    plain = (grads(torch.bfloat16, None) - truth).norm()
    for chunk_size in (2, 16):
        assert (grads(torch.bfloat16, chunk_size) - truth).norm() <= 1.1 * plain


@pytest.mark.parametrize("lost", ["state", "gradient", "segments"])
def test_a_fault_is_seen(lost: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if lost == "state":
        monkeypatch.setattr(StateStore, "keep", lambda self, position, states: None)
    elif lost == "gradient":
        monkeypatch.setattr(StateRelay, "hand_back", lambda self: None)
    else:
        monkeypatch.setattr(
            "chunkdist.stream.from_inputs.cut_segments", lambda starts, n, size: cut_segments((0,), n, size)
        )
    assert error_of("Qwen3_5ForCausalLM", "packed", chunk_size=5) > 1e-3


class TestRelay:
    def relay(self, store: StateStore, start: int, end: int) -> StateRelay:
        return store.relay(Chunk(start, end))

    def test_a_convolution_sees_the_inputs_of_the_chunks_before(self) -> None:
        """Also when a chunk is shorter than the convolution reaches."""
        x = torch.arange(10.0).view(1, 1, 10).requires_grad_()
        store, seen = StateStore(), []
        with torch.no_grad():
            for start in range(0, 10, 2):
                relay = self.relay(store, start, start + 2)
                seen.append(relay.update_conv_state(x[..., start : start + 2], 0, conv_kernel_size=4))
                relay.hand_on((start + 2,))
        assert seen[0].flatten().tolist() == [0, 1]
        assert seen[1].flatten().tolist() == [0, 0, 0, 1, 2, 3]
        assert seen[3].flatten().tolist() == [2, 3, 4, 5, 6, 7]

    def test_the_state_given_may_be_written_to(self) -> None:
        store = StateStore()
        store.keep(4, {("recurrent", 0, 0): torch.ones(2)})
        given = self.relay(store, 4, 8).get_recurrent_state(0)
        assert given is not None
        given.mul_(2)
        assert torch.equal(self.relay(store, 4, 8).get_recurrent_state(0), torch.ones(2))

    def test_gradients_of_bf16_states_are_in_fp32(self) -> None:
        store = StateStore()
        store.keep(4, {("conv", 0, 0): torch.ones(1, 1, 4, dtype=torch.bfloat16)})
        relay = self.relay(store, 4, 8)
        seen = relay.update_conv_state(torch.ones(1, 1, 4, dtype=torch.bfloat16), 0, conv_kernel_size=4)
        assert seen.dtype == torch.bfloat16
        seen.sum().backward()
        relay.hand_back()
        assert {grad.dtype for grad in store.grads[4].values()} == {torch.float32}

    def test_what_is_not_relayed_is_refused(self) -> None:
        with pytest.raises(UnsupportedModelError, match="asks its cache for get_mask_sizes"):
            self.relay(StateStore(), 0, 4).get_mask_sizes(4, 0)


class TestRefusals:
    def test_a_sampler(self) -> None:
        config = ChunkConfig(chunk_size=4, sampler=IndependentSampler(budget=2))
        with pytest.raises(ValueError, match="a dropped chunk cuts the chain of states"):
            chunk_model(tiny_model("Qwen3_5ForCausalLM"), config)

    def test_rows_with_other_segments(self) -> None:
        model = chunk_model(tiny_model("Qwen3_5ForCausalLM").float(), ChunkConfig(chunk_size=4))
        positions = torch.stack([torch.arange(12), torch.arange(12) % 7])
        with pytest.raises(ValueError, match="needs one row"):
            model(**ids(12, num_rows=2), position_ids=positions)

    def test_a_token_shift_outside_of_the_cache(self) -> None:
        model = transformers.LlamaForCausalLM(tiny_config("LlamaForCausalLM"))
        model.model.layers[1].mlp = nn.Sequential(nn.ZeroPad2d((0, 0, 1, -1)))
        chunk_model(model, ChunkConfig(chunk_size=4))
        with pytest.raises(UnsupportedModelError, match="keeps no state in its cache"):
            model(**ids(12))


def unknown(model: Any) -> Any:
    """The same model, of a class that transformers does not have."""
    model = model.float()
    model.__class__ = type("Mine", (type(model),), {"__module__": "mine"})
    return model


def test_states_do_not_outlive_the_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the loss does, and with it the graph; and a second backward through it is right."""
    states: list[weakref.ref[Tensor]] = []
    keep = StateStore.keep

    def noted(self: StateStore, position: int, given: Any) -> None:
        states.extend(weakref.ref(x) for x in given.values())
        keep(self, position, given)

    monkeypatch.setattr(StateStore, "keep", noted)
    model = chunk_model(tiny_model("Qwen3_5ForCausalLM").float(), ChunkConfig(chunk_size=7))
    loss = model(**ids(NUM_TOKENS), use_cache=False).loss
    loss.backward(retain_graph=True)
    assert any(x() is not None for x in states)
    first = {name: p.grad.clone() for name, p in model.named_parameters()}
    loss.backward()
    gc.collect()
    assert states
    assert all(x() is None for x in states)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, 2 * first[name])


def test_planes_of_positions_are_no_packing() -> None:
    """Three planes, as of an image in the text: only before those is there one of plain positions."""
    temporal = torch.tensor([*range(8), *[8] * 8, *range(16, 24)])
    planes = torch.stack([temporal, torch.arange(24), torch.arange(24)])[:, None]
    packed = torch.cat([torch.arange(10), torch.arange(14)])[None, None]

    def found(position_ids: Tensor, chunk_size: int | None) -> dict[str, Tensor]:
        model = tiny_model("Qwen3_5ForCausalLM")
        if chunk_size is not None:
            chunk_model(model, ChunkConfig(chunk_size=chunk_size))
        return gradients(model, {**ids(24), "position_ids": position_ids})

    with double_precision():
        truth = found(planes, None)
        assert largest_difference(found(planes, 7), truth) < 1e-9
        packs = found(torch.cat([packed, planes]), 7)
    assert not torch.allclose(packs["loss"], truth["loss"], rtol=1e-4), "the first of four planes does"


def test_sequence_numbers_that_say_something_else() -> None:
    model = chunk_model(tiny_model("Qwen3_5ForCausalLM").float(), ChunkConfig(chunk_size=7))
    seq_idx = torch.tensor([[0] * 10 + [1] * 14])
    with pytest.raises(ValueError, match=r"seq_idx says .* begin at \(0, 10\).* say \(0,\)"):
        model(**ids(24), seq_idx=seq_idx, use_cache=False)
    position_ids = torch.cat([torch.arange(10), torch.arange(14)])[None]
    assert model(**ids(24), seq_idx=seq_idx, position_ids=position_ids, use_cache=False).loss.isfinite()


class TestProbe:
    """For classes that the record does not have."""

    def test_an_exact_class_passes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(probe, "CLASSES", frozenset())
        asked: list[str] = []
        check = probe.LayerProbe.check

        def noted(self: probe.LayerProbe, layer: Any, *args: Any) -> None:
            before = len(self.passed)
            check(self, layer, *args)
            asked.extend([type(layer.layer).__name__] * (len(self.passed) - before))

        monkeypatch.setattr(probe.LayerProbe, "check", noted)
        model = tiny_model("Qwen3_5ForCausalLM").bfloat16()
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        chunk_model(model, ChunkConfig(chunk_size=7))
        for _ in range(2):
            gradients(model, ids(NUM_TOKENS))
        assert len(asked) == 2, "one layer with state, one with attention, once"
        assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
        assert all(p.dtype == torch.bfloat16 for p in model.parameters())

    def test_a_known_class_is_not_probed(self) -> None:
        model = chunk_model(tiny_model("Qwen3_5ForCausalLM"), ChunkConfig(chunk_size=7))
        assert model._chunkdist_model.additions.probe is None  # type: ignore[attr-defined]

    def test_another_version_of_transformers_is_not_known(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(probe, "TRANSFORMERS_VERSION", "5.24.0")
        assert not probe.is_known(transformers.Qwen3_5ForCausalLM)

    @pytest.mark.parametrize("fault", ["state", "gradient"])
    def test_what_is_not_exact_is_refused(self, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """A layer that ignores the state it is given, and one that ignores its gradient alone."""
        monkeypatch.setattr(probe, "CLASSES", frozenset())
        given = StateRelay.get_recurrent_state

        def faulty(self: StateRelay, layer_idx: int, state_idx: int = 0) -> Tensor | None:
            state = given(self, layer_idx, state_idx)
            return None if fault == "state" or state is None else state.detach()

        monkeypatch.setattr(StateRelay, "get_recurrent_state", faulty)
        model = chunk_model(tiny_model("Qwen3_5ForCausalLM").float(), ChunkConfig(chunk_size=7))
        with pytest.raises(UnsupportedModelError, match="is not exact in chunks"):
            model(**ids(NUM_TOKENS))

    @pytest.mark.parametrize("mixer", ["shift", "mean"])
    def test_mixers_that_have_no_known_name(self, mixer: str) -> None:
        """Tokens that mix in plain code, in a layer that looks as if only its attention did."""

        class Mixing(nn.Module):
            def __init__(self, mlp: nn.Module) -> None:
                super().__init__()
                self.mlp = mlp

            def forward(self, x: Tensor) -> Tensor:
                if mixer == "shift":
                    return self.mlp(x + torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1))
                return self.mlp(x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[None, :, None])

        model = unknown(tiny_model("LlamaForCausalLM"))
        for layer in model.model.layers:
            layer.mlp = Mixing(layer.mlp)
        chunk_model(model, ChunkConfig(chunk_size=7))
        with pytest.raises(UnsupportedModelError, match="is not exact in chunks"):
            model(**ids(NUM_TOKENS))

    @pytest.mark.parametrize("fault", ["second layer", "long chunks"])
    def test_what_some_layers_or_some_lengths_do(self, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
        model = unknown(tiny_model("Qwen3_5ForCausalLM", ["linear_attention"] * 2))
        given = StateRelay.get_recurrent_state

        def faulty(self: StateRelay, layer_idx: int, state_idx: int = 0) -> Tensor | None:
            wrong = layer_idx == 1 if fault == "second layer" else self._chunk.num_tokens > 20
            return None if wrong else given(self, layer_idx, state_idx)

        monkeypatch.setattr(StateRelay, "get_recurrent_state", faulty)
        chunk_model(model, ChunkConfig(chunk_size=50))
        with pytest.raises(UnsupportedModelError, match="is not exact in chunks"):
            model(**ids(100))

    def test_kernels_that_the_sweep_has_not_seen(self, monkeypatch: pytest.MonkeyPatch) -> None:
        hybrid, plain = tiny_model("Qwen3_5ForCausalLM"), tiny_model("LlamaForCausalLM")
        assert not probe.needs_probe(hybrid, has_state=True)
        monkeypatch.setattr(probe, "find_spec", lambda name: name == "fla")
        assert probe.needs_probe(hybrid, has_state=True)
        assert not probe.needs_probe(plain, has_state=False)

    def test_without_the_probe_the_sweep_says_wrong(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(probe.LayerProbe, "check", lambda *args: None)
        assert run_class("JambaForCausalLM").outcome == "wrong"


def test_layers_of_state_have_no_keys_and_values(monkeypatch: pytest.MonkeyPatch) -> None:
    written: set[Chunk] = set()
    stores: set[int] = set()
    write = KVStore.write

    def noted(self: KVStore, chunk: Chunk, *kv: Tensor) -> None:
        if chunk.num_tokens > 1:  # not the token that shows what a layer returns
            stores.add(id(self))
            written.add(chunk)
        write(self, chunk, *kv)

    monkeypatch.setattr(KVStore, "write", noted)
    model = chunk_model(
        tiny_model("NemotronHForCausalLM").float(), ChunkConfig(chunk_size=7, layers_per_group="all")
    )
    gradients(model, ids(NUM_TOKENS))
    assert len(written) == 6
    assert len(stores) == 1, "one of the four layers attends"
