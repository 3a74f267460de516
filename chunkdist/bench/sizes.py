"""The models that are timed: Llamas of several sizes, with random weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """A Llama, and the sequence it is trained on; with a `lora_rank`, only adapters are trained."""

    num_tokens: int
    chunk_size: int
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    lora_rank: int = 0

    def config_values(self) -> dict[str, int]:
        """As `LlamaConfig` calls the sizes of the model."""
        return {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
        }

    def model(self, device: str, dtype: torch.dtype) -> Any:
        """The model, with random weights: neither speed nor memory depend on their values."""
        values: dict[str, Any] = self.config_values()
        config = LlamaConfig(**values, max_position_embeddings=self.num_tokens, use_cache=False)
        torch.manual_seed(0)
        with torch.device(device):
            model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
        if self.lora_rank:
            from peft import LoraConfig, get_peft_model

            lora = LoraConfig(
                r=self.lora_rank,
                target_modules=["q_proj", "v_proj"],
                init_lora_weights=False,  # else half of the gradients are 0, and nothing could be compared
                task_type="CAUSAL_LM",
            )
            model = get_peft_model(model, lora, autocast_adapter_dtype=False)
        model.train()
        return model

    def tokens(self, device: str) -> Tensor:
        """(1, num_tokens), the same on every device."""
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(0, self.vocab_size, (1, self.num_tokens), generator=generator)
        return ids.to(device)


SIZES = {
    "smoke": Sizes(
        num_tokens=64,
        chunk_size=16,
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
    ),
    "ci": Sizes(
        num_tokens=1024,
        chunk_size=128,
        vocab_size=256,
        hidden_size=128,
        intermediate_size=352,
        num_layers=4,
        num_heads=2,
        num_kv_heads=2,
    ),
    "10m": Sizes(
        num_tokens=8192,
        chunk_size=1024,
        vocab_size=256,
        hidden_size=320,
        intermediate_size=896,
        num_layers=8,
        num_heads=5,
        num_kv_heads=5,
    ),
    "1b": Sizes(
        num_tokens=32768,
        chunk_size=4096,
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_layers=16,
        num_heads=32,
        num_kv_heads=8,
    ),
    "8b": Sizes(
        num_tokens=16384,
        chunk_size=4096,
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        lora_rank=8,
    ),
}
"""`8b` has the geometry of Llama-3-8B; `ci` is what tests time."""

LLAMA_3_8B = SIZES["8b"].config_values()
