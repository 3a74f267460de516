"""A checkpoint of another model, of another adapter or of another kind is refused, by names and shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from chunkdist.train.checkpoints.trained_weights import refuse_other_weights


def whole(hidden_size: int = 8, **values: Any) -> LlamaForCausalLM:
    sizes = {"intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 16}
    return LlamaForCausalLM(LlamaConfig(hidden_size=hidden_size, **{**sizes, **values}))


def adapter(rank: int, modules: str = "q_proj") -> Any:
    return get_peft_model(whole(), LoraConfig(r=rank, target_modules=[modules], task_type="CAUSAL_LM"))


def test_only_the_same_weights_are_resumed(tmp_path: Path) -> None:
    whole().save_pretrained(tmp_path / "whole")
    whole(tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    adapter(2).save_pretrained(tmp_path / "adapter")
    refuse_other_weights(tmp_path / "whole", whole())
    refuse_other_weights(tmp_path / "tied", whole(tie_word_embeddings=True))
    refuse_other_weights(tmp_path / "adapter", adapter(2))
    refuse_other_weights(tmp_path / "nothing", whole())
    for folder, model, said in (
        ("whole", whole(16), "is of another model or adapter: its .* has shape"),
        ("whole", whole(num_hidden_layers=2, intermediate_size=4), "another model or adapter"),
        ("adapter", adapter(3), r"lora_A.weight has shape \(2, 8\), and this one has \(3, 8\)"),
        ("adapter", adapter(2, "v_proj"), "q_proj.* this one has none of that name"),
        ("adapter", whole(), r"holds an adapter \(use_peft: true\), and this job trains another kind"),
        ("whole", adapter(2), "holds a whole model, and this job trains another kind"),
    ):
        with pytest.raises(ValueError, match=said):
            refuse_other_weights(tmp_path / folder, model)
