import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from chunkdist.models.flops import StepFlops, num_active_parameters, num_pairs, peak_flops


def build(model_type: str, **options: object) -> nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **options))


LLAMA_3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "vocab_size": 1000,
    "num_attention_heads": 4,
}


@pytest.mark.parametrize(
    ("window", "expected"),
    [(None, 15), (1, 5), (2, 9), (3, 12), (5, 15), (9, 15)],
)
def test_pairs_of_a_segment(window: int | None, expected: int) -> None:
    brute = sum(1 for q in range(5) for k in range(5) if k <= q and (window is None or q - k < window))
    assert num_pairs(5, window) == brute == expected


class TestActiveParameters:
    def test_llama_3_8b(self) -> None:
        # 8.03 billion, less the embedding table (525 million) and the 65 norms
        assert (
            num_active_parameters(build("llama", **LLAMA_3_8B)) == 8_030_261_248 - 128256 * 4096 - 65 * 4096
        )

    def test_a_tied_head_counts_once(self) -> None:
        untied = num_active_parameters(build("llama", **SMALL, tie_word_embeddings=False))
        tied = num_active_parameters(build("llama", **SMALL, tie_word_embeddings=True))
        assert tied == untied

    def test_mixtral_counts_two_of_eight_experts(self) -> None:
        assert num_active_parameters(build("mixtral")) == pytest.approx(12.75e9, rel=1e-3)

    def test_learned_positions_are_looked_up(self) -> None:
        assert num_active_parameters(build("gpt2")) == pytest.approx(124_439_808 - 1024 * 768, rel=1e-3)

    def test_trained_copies_of_a_module_count_once(self) -> None:
        plain = num_active_parameters(build("llama", **SMALL))
        peft = get_peft_model(
            build("llama", **SMALL), LoraConfig(target_modules=["q_proj"], r=2, modules_to_save=["lm_head"])
        )
        assert num_active_parameters(peft) == plain + 2 * 2 * (64 + 64)


class TestStep:
    def test_full_attention(self) -> None:
        flops = StepFlops.of(build("llama", **LLAMA_3_8B))
        tokens = 8192
        assert flops.step([tokens]) == (
            6 * num_active_parameters(build("llama", **LLAMA_3_8B)) * tokens
            + 12 * 32 * 4096 * (tokens * (tokens + 1) // 2)
        )

    def test_segments_do_not_see_each_other(self) -> None:
        flops = StepFlops.of(build("llama", **LLAMA_3_8B))
        assert flops.step([4096, 4096]) < flops.step([8192])
        assert flops.step([4096, 4096]) == 2 * flops.step([4096])

    def test_sliding_and_full_layers(self) -> None:
        model = build("gpt_oss", num_hidden_layers=4, num_local_experts=4, sliding_window=128)
        flops = StepFlops.of(model)
        assert [window for window, _ in flops.per_pair] == [None, 128]
        cost = 12 * 2 * 64 * 64  # two layers of each kind, 64 heads of 64
        assert flops.step([1000]) == 1000 * flops.per_token + cost * (num_pairs(1000) + num_pairs(1000, 128))

    def test_every_layer_slides(self) -> None:
        assert [window for window, _ in StepFlops.of(build("mistral", sliding_window=512)).per_pair] == [512]

    def test_a_window_that_is_switched_off(self) -> None:
        model = build("qwen2", use_sliding_window=False, sliding_window=512)
        assert [window for window, _ in StepFlops.of(model).per_pair] == [None]

    def test_mla_values_are_narrower(self) -> None:
        model = build("deepseek_v3", num_hidden_layers=2, n_routed_experts=8, n_group=1, topk_group=1)
        assert StepFlops.of(model).per_pair == ((None, 6 * 2 * 128 * (192 + 128)),)

    def test_counts_from_positions_are_those_of_the_lengths(self) -> None:
        flops = StepFlops.of(build("gpt_oss", num_hidden_layers=2, num_local_experts=4, sliding_window=4))
        packed = torch.cat([torch.arange(7), torch.arange(3), torch.arange(12)])[None]
        assert flops.from_counts(flops.counts(packed).tolist()) == flops.step([7, 3, 12])
        padded = torch.arange(8).expand(2, 8)
        mask = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
        assert flops.from_counts(flops.counts(padded, mask).tolist()) == flops.step([8, 5])


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H20", 148),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10G", 70),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA RTX A6000", 155),
        ("NVIDIA RTX 6000 Ada Generation", 364),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 3090", 71),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce GTX 1080 Ti", None),
        ("Some other card", None),
    ],
)
def test_peak_of_known_cards(name: str, teraflops: float | None) -> None:
    assert peak_flops(name) == (None if teraflops is None else teraflops * 1e12)
