"""The gradient check finds faults that are planted, passes where there is none, and changes nothing."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import chunkdist.check.gradients
from chunkdist import ChunkConfig, chunk_model, unchunk_model
from chunkdist.check.gradients import Distance, as_good_as, check_gradients
from chunkdist.check.sample import check_chunk_size, short_sample
from chunkdist.chunking import chunk_report
from chunkdist.stream.stream import Chunk
from tests.helpers.models import VOCAB_SIZE, batch, packed_batch, tiny_llama, with_lora

CONFIG = ChunkConfig(chunk_size=16)


def model_of(dtype: torch.dtype = torch.float32, **settings: Any) -> nn.Module:
    return tiny_llama(
        num_layers=2, dtype=dtype, attn_implementation="sdpa", initializer_range=0.1, **settings
    )


def plant(monkeypatch: pytest.MonkeyPatch, fault: Callable[[torch.Tensor], torch.Tensor], name: str) -> None:
    """While a model is chunked, `fault` changes the gradient of the parameter `name`."""
    hooks: list[Any] = []

    def faulty_chunk_model(model: nn.Module, config: ChunkConfig) -> nn.Module:
        hooks.append(dict(model.named_parameters())[name].register_hook(fault))
        return chunk_model(model, config)

    def faulty_unchunk_model(model: nn.Module) -> nn.Module:
        hooks.pop().remove()
        return unchunk_model(model)

    monkeypatch.setattr(chunkdist.check.gradients, "chunk_model", faulty_chunk_model)
    monkeypatch.setattr(chunkdist.check.gradients, "unchunk_model", faulty_unchunk_model)


NARROW = [torch.float32, torch.bfloat16, torch.float16]


class TestPasses:
    @pytest.mark.parametrize("dtype", [*NARROW, torch.float64])
    def test_dtypes(self, dtype: torch.dtype) -> None:
        result = check_gradients(model_of(dtype), batch(num_tokens=100), CONFIG)
        assert result.passed, result.report()
        assert (result.num_tokens, result.num_chunks, result.chunk_size) == (100, 7, 16)
        assert (result.exact is None) == (dtype == torch.float64)

    @pytest.mark.parametrize(
        "config",
        [
            ChunkConfig(chunk_size=16, layers_per_group="all"),
            ChunkConfig(chunk_size=16, retained_chunks=2),
            ChunkConfig(chunk_size=10_000),
            ChunkConfig(chunk_size=16, attention="math"),
        ],
    )
    def test_configs(self, config: ChunkConfig) -> None:
        result = check_gradients(model_of(), batch(num_tokens=50), config)
        assert result.passed, result.report()
        assert result.num_chunks >= 4

    @pytest.mark.parametrize("legacy", [False, True])
    def test_fp32_is_not_rounded_where_it_is_the_truth(
        self, monkeypatch: pytest.MonkeyPatch, legacy: bool
    ) -> None:
        matmul = torch.backends.cuda.matmul
        seen: set[tuple[torch.dtype, str]] = set()

        def note(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            seen.add((output.dtype, matmul.fp32_precision))

        model: Any = model_of(torch.bfloat16)
        model.model.layers[0].mlp.down_proj.register_forward_hook(note)
        if legacy:
            torch.set_float32_matmul_precision("high")
        else:
            torch.backends.fp32_precision = "tf32"  # as transformers' `tf32: true` does
        try:
            assert check_gradients(model, batch(num_tokens=40), CONFIG).passed
            assert matmul.fp32_precision == "tf32"
        finally:
            torch.backends.fp32_precision = "none"
            torch.set_float32_matmul_precision("highest")
        assert seen == {(torch.bfloat16, "tf32"), (torch.float32, "ieee")}

    def test_lora_on_frozen_weights(self) -> None:
        result = check_gradients(with_lora(model_of(torch.bfloat16)), batch(num_tokens=60), CONFIG)
        assert result.passed, result.report()
        assert result.num_parameters == 2 * 2 * 7

    def test_packed_segments_and_padded_rows(self) -> None:
        assert check_gradients(model_of(), packed_batch([30, 5, 40]), CONFIG).passed
        padded = batch(num_rows=2, num_tokens=60)
        padded["attention_mask"] = torch.ones(2, 60, dtype=torch.long)
        padded["attention_mask"][1, 40:] = 0
        padded["labels"][1, 40:] = -100
        assert check_gradients(model_of(), padded, CONFIG).passed

    def test_gradients_that_vanish(self) -> None:
        """The bias of the keys moves all scores of a query alike: its gradient is nothing but rounding."""
        assert check_gradients(
            model_of(torch.bfloat16, attention_bias=True), batch(num_tokens=90), CONFIG
        ).passed

    def test_dropout_is_switched_off(self) -> None:
        model = with_lora(model_of(), lora_dropout=0.5)
        model.train()
        assert check_gradients(model, batch(num_tokens=50), CONFIG).passed

    def test_a_sample_without_labels(self) -> None:
        sample = batch(num_tokens=50)
        sample["labels"][:] = -100
        assert check_gradients(model_of(), sample, CONFIG).passed

    def test_under_autocast(self) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            result = check_gradients(model_of(), batch(num_tokens=50), CONFIG)
        assert result.passed, result.report()
        assert result.plain.overall > 1e-4  # it was bf16 that was checked


class TestFindsFaults:
    @pytest.mark.parametrize("dtype", NARROW)
    def test_one_gradient_scaled_by_a_hundredth(
        self, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
    ) -> None:
        name = "model.layers.1.mlp.up_proj.weight"
        plant(monkeypatch, lambda grad: grad * 1.01, name)
        result = check_gradients(model_of(dtype), batch(num_tokens=60), CONFIG)
        assert not result.passed
        assert result.exact is not None
        assert result.exact.worst == name
        assert result.exact.largest == pytest.approx(0.01, rel=0.01)
        assert "FAILED" in result.report()
        assert name in result.report()

    @pytest.mark.parametrize("fault", [torch.zeros_like, lambda grad: grad * torch.nan, torch.neg])
    def test_a_gradient_that_is_lost_or_wrong(
        self, monkeypatch: pytest.MonkeyPatch, fault: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        plant(monkeypatch, fault, "model.layers.0.input_layernorm.weight")
        assert not check_gradients(model_of(), batch(num_tokens=60), CONFIG).passed

    def test_without_a_wider_dtype(self, monkeypatch: pytest.MonkeyPatch) -> None:
        plant(monkeypatch, lambda grad: grad * 1.01, "model.layers.1.mlp.up_proj.weight")
        assert not check_gradients(model_of(torch.float64), batch(num_tokens=60), CONFIG).passed

    def test_worse_only_in_the_narrow_dtype(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As of a kernel that exists for bf16 only."""
        plant(
            monkeypatch,
            lambda grad: grad * 1.2 if grad.dtype == torch.bfloat16 else grad,
            "model.layers.1.mlp.up_proj.weight",
        )
        result = check_gradients(model_of(torch.bfloat16), batch(num_tokens=60), CONFIG)
        assert not result.passed
        assert result.exact is not None
        assert result.exact.largest < 1e-4

    def test_keys_forgotten(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A fault of the engine itself: the keys get no gradient."""
        from chunkdist.stores.kv_store import KVStore

        original = KVStore.grads_of

        def forget_keys(store: KVStore, chunk: Chunk) -> tuple[torch.Tensor, torch.Tensor] | None:
            dk, dv = original(store, chunk) or pytest.fail("nothing was left")
            return dk * 0, dv

        monkeypatch.setattr(KVStore, "grads_of", forget_keys)
        assert not check_gradients(model_of(), batch(num_tokens=60), CONFIG).passed


@pytest.mark.parametrize(
    ("overall", "largest", "expected"),
    [
        (1.0, 1.0, True),
        (1.5, 2.0, True),
        (1.7, 2.0, False),
        (1.5, 2.2, False),
        (0.0, math.nan, False),
        (math.nan, 0.0, False),
    ],
)
def test_as_good_as(overall: float, largest: float, expected: bool) -> None:
    plain = Distance(overall=0.1, largest=0.3, worst="a")
    chunked = Distance(overall=0.1 * overall, largest=0.3 * largest, worst="b")
    assert as_good_as(chunked, plain, slack=0.01) == expected


class TestFallback:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_not_enough_memory(self, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
        monkeypatch.setattr("chunkdist.check.model_state.free_bytes", lambda device: 1000)
        result = check_gradients(model_of(dtype), batch(num_tokens=60), CONFIG)
        assert result.passed, result.report()
        assert result.exact is None
        assert "GiB would be needed" in result.report()
        assert "rounded like this one" in result.report()
        assert result.plain.largest > 0

        plant(monkeypatch, torch.zeros_like, "model.layers.1.mlp.up_proj.weight")
        assert not check_gradients(model_of(dtype), batch(num_tokens=60), CONFIG).passed

    def test_an_operation_without_the_wider_dtype(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = model_of()

        def refuse_fp64(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            if args[0].dtype == torch.float64:
                raise NotImplementedError("no kernel for Double\nand a long list")

        model.model.layers[0].mlp.register_forward_pre_hook(refuse_fp64)
        result = check_gradients(model, batch(num_tokens=60), CONFIG)
        assert result.passed
        assert "no kernel for Double" in result.notes[0]
        assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.float32

    def test_quantised_weights(self) -> None:
        class Params4bit(nn.Parameter):
            pass

        model = with_lora(model_of())
        frozen = model.get_base_model().model.layers[0].mlp.up_proj.base_layer
        frozen.weight = Params4bit(frozen.weight.data, requires_grad=False)
        result = check_gradients(model, batch(num_tokens=60), CONFIG)
        assert result.passed
        assert "quantised" in result.notes[0]

    def test_experts_run_in_fp64(self) -> None:
        """Their grouped matrix product does not."""
        config = AutoConfig.for_model(
            "mixtral",
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=4,
            vocab_size=VOCAB_SIZE,
        )
        model = AutoModelForCausalLM.from_config(config)
        before = model.config._experts_implementation
        result = check_gradients(model, batch(num_tokens=60), CONFIG)
        assert result.passed, result.report()
        assert result.exact is not None
        assert model.config._experts_implementation == before


class TestLeavesNoTrace:
    def snapshot(self, model: nn.Module) -> dict[str, Any]:
        return {
            "parameters": {
                n: (id(p), p.data_ptr(), p.dtype, p.requires_grad) for n, p in model.named_parameters()
            },
            "values": {n: p.detach().clone() for n, p in model.named_parameters()},
            "grads": {
                n: (id(p.grad), None if p.grad is None else p.grad.clone())
                for n, p in model.named_parameters()
            },
            "buffers": {n: (id(b), b.clone()) for n, b in model.named_buffers()},
            "modes": {n: m.training for n, m in model.named_modules()},
            "attributes": {n: set(m.__dict__) for n, m in model.named_modules()},
            "hooks": {n: len(m._forward_hooks) + len(m._forward_pre_hooks) for n, m in model.named_modules()},
            "config": model.config.to_dict(),
            "rng": torch.get_rng_state(),
        }

    @pytest.mark.parametrize("fails", [False, True])
    @pytest.mark.parametrize("is_chunked", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_everything_is_as_before(
        self, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, is_chunked: bool, fails: bool
    ) -> None:
        model = model_of(dtype)
        model.model.embed_tokens.weight.requires_grad_(False)
        model.model.layers[0].eval()
        model(**batch()).loss.backward()  # gradients of an accumulation that is under way
        if is_chunked:
            chunk_model(model, CONFIG)
        before = self.snapshot(model)
        if fails:
            monkeypatch.setattr(chunkdist.check.gradients, "_distance", lambda *grads: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                check_gradients(model, batch(num_tokens=50), CONFIG)
        else:
            assert check_gradients(model, batch(num_tokens=50), CONFIG).passed
        after = self.snapshot(model)
        for key in before:
            assert_same(before[key], after[key], key)
        if is_chunked:
            assert chunk_report(model).chunk_size == CONFIG.chunk_size
        else:
            with pytest.raises(ValueError, match="not chunked"):
                chunk_report(model)

    def test_the_next_step_is_the_same(self) -> None:
        checked, other = (chunk_model(model_of(), CONFIG) for _ in range(2))
        check_gradients(checked, batch(num_tokens=50), CONFIG)
        for model in (checked, other):
            model(**batch(num_tokens=50, seed=1)).loss.backward()
        for mine, theirs in zip(checked.parameters(), other.parameters(), strict=True):
            assert torch.equal(mine.grad, theirs.grad)

    def test_the_batch_is_not_changed(self) -> None:
        sample = batch(num_tokens=50)
        sample["labels"][:] = -100
        before = copy.deepcopy(sample)
        check_gradients(model_of(), sample, CONFIG)
        assert_same(before, sample, "batch")


def assert_same(before: Any, after: Any, name: str) -> None:
    if isinstance(before, torch.Tensor):
        assert torch.equal(before, after), name
    elif isinstance(before, dict):
        assert before.keys() == after.keys(), name
        for key in before:
            assert_same(before[key], after[key], f"{name}.{key}")
    elif isinstance(before, tuple):
        for first, second in zip(before, after, strict=True):
            assert_same(first, second, name)
    else:
        assert before == after, name


class TestRefuses:
    def test_nothing_to_train(self) -> None:
        with pytest.raises(ValueError, match="unfreeze"):
            check_gradients(model_of().requires_grad_(False), batch(num_tokens=50), CONFIG)

    def test_a_sample_of_few_tokens(self) -> None:
        with pytest.raises(ValueError, match="4 tokens, too few"):
            check_gradients(model_of(), batch(num_tokens=4), CONFIG)

    def test_another_config_than_the_model_has(self) -> None:
        model = chunk_model(model_of(), CONFIG)
        with pytest.raises(ValueError, match="chunk_size=16"):
            check_gradients(model, batch(num_tokens=50), ChunkConfig(chunk_size=8))

    def test_weights_that_are_not_here(self) -> None:
        with torch.device("meta"):
            model = model_of()
        with pytest.raises(RuntimeError, match="meta device"):
            check_gradients(model, batch(num_tokens=50), CONFIG)


class TestSample:
    @pytest.mark.parametrize("num_tokens", [*range(5, 40), 100, 511, 512])
    @pytest.mark.parametrize("chunk_size", [1, 2, 7, 16, 4096])
    def test_three_chunks_and_a_part(self, num_tokens: int, chunk_size: int) -> None:
        size = check_chunk_size(num_tokens, chunk_size)
        assert 1 <= size <= chunk_size
        assert num_tokens // size >= 3
        assert size == 1 or num_tokens % size

    def test_cuts_what_runs_along_the_tokens(self) -> None:
        sample = packed_batch([30, 50, 20])
        sample["cu_seq_lens_q"] = torch.tensor([0, 30, 80, 100], dtype=torch.int32)
        sample["max_length_q"] = 50
        sample["num_items_in_batch"] = torch.tensor(99)
        short = short_sample(sample, max_tokens=40, device=torch.device("cpu"))
        assert short["input_ids"].tolist() == sample["input_ids"][:, :40].tolist()
        assert short["position_ids"].tolist() == [[*range(30), *range(10)]]
        assert short["cu_seq_lens_q"].tolist() == [0, 30, 40]
        assert short["cu_seq_lens_q"].dtype == torch.int32
        assert short["max_length_q"] == 30
        assert "num_items_in_batch" not in short

    def test_takes_two_rows(self) -> None:
        short = short_sample(batch(num_rows=3, num_tokens=50), max_tokens=40, device=torch.device("cpu"))
        assert short["input_ids"].shape == short["labels"].shape == (2, 20)
