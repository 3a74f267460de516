"""The models that are timed: Llamas of several sizes, with random weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig


@dataclass(frozen=True)
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
        """The sizes under the names of `LlamaConfig`."""
        return {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
        }

    def model(self, device: str, dtype: torch.dtype, attention: str = "sdpa") -> Any:
        """The model, with random weights: neither speed nor memory depend on their values."""
        values: dict[str, Any] = self.config_values()
        config = LlamaConfig(**values, max_position_embeddings=self.num_tokens, use_cache=False)
        torch.manual_seed(0)
        with torch.device(device):
            model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
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

    def described(self, model: Any) -> dict[str, Any]:
        """What a result says of the model."""
        dtype = str(model.dtype).removeprefix("torch.")
        return {**asdict(self), "num_parameters": model.num_parameters(), "dtype": dtype}


SIZES = {
    #            tokens, chunk, vocabulary, hidden, MLP, layers, heads, K/V heads, LoRA rank
    "smoke": Sizes(64, 16, 64, 32, 64, 2, 2, 1),
    "ci": Sizes(1024, 128, 256, 128, 352, 4, 2, 2),
    "10m": Sizes(8192, 1024, 256, 320, 896, 8, 5, 5),
    "1b": Sizes(32768, 4096, 128256, 2048, 8192, 16, 32, 8),
    "8b": Sizes(16384, 4096, 128256, 4096, 14336, 32, 32, 8, lora_rank=8),
}
"""`8b` has the geometry of Llama-3-8B."""

LLAMA_3_8B = SIZES["8b"].config_values()


def set_checkpointing(model: Any, on: bool, **settings: Any) -> None:
    """Hugging Face's gradient checkpointing, under the name that this version of transformers has for it."""
    # `activation_*` is new in transformers 5, the old names go with version 6: then this needs no choice
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    change = getattr(model, f"{name}_checkpointing_{'enable' if on else 'disable'}")
    change({"use_reentrant": False, **settings}) if on else change()
