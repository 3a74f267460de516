"""Tiny models for the engine's tests, and the unchunked truth: attention and its masks in plain torch, in any
dtype."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, eager_mask

VOCAB_SIZE = 61


def plain_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As transformers' eager attention, but with the softmax in the dtype of the scores."""
    groups = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(groups, 1).transpose(-1, -2) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores + attention_mask
    if s_aux is not None:
        sinks = s_aux.reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1).to(scores.dtype)
        weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return (weights @ value.repeat_interleave(groups, 1)).transpose(1, 2), None


AttentionInterface.register("plain", plain_attention)
AttentionMaskInterface.register("plain", eager_mask)


def tiny_llama(
    *, num_layers: int = 4, dtype: torch.dtype = torch.float64, seed: int = 0, **overrides: Any
) -> PreTrainedModel:
    """Llama with weights large enough that attention looks at the whole prefix."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "attn_implementation": "plain",
        **overrides,
    }
    model: PreTrainedModel = AutoModelForCausalLM.from_config(LlamaConfig(**settings)).to(dtype)
    return model.train()


_NORMS = tuple(f"{family}RMSNorm" for family in ("Llama", "Gemma2", "Gemma3", "Qwen3", "Mistral"))


def norms_in_fp64(model: PreTrainedModel) -> PreTrainedModel:
    """Transformers' norms compute in fp32, whatever the model's dtype: here, torch's own in their places."""
    for parent in list(model.modules()):
        for name, norm in parent.named_children():
            if type(norm).__name__ in _NORMS:
                eps = getattr(norm, "variance_epsilon", None) or norm.eps
                setattr(parent, name, nn.RMSNorm(norm.weight.shape[0], eps=eps, dtype=torch.float64))
    return model


def with_lora(model: PreTrainedModel, **settings: Any) -> nn.Module:
    """LoRA with non-zero B matrices, so that both factors have gradients."""
    settings = {
        "r": 4,
        "target_modules": "all-linear",
        "init_lora_weights": False,
        "task_type": "CAUSAL_LM",
        **settings,
    }
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(**settings), autocast_adapter_dtype=False)


def batch(*, num_rows: int = 1, num_tokens: int = 37, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB_SIZE, (num_rows, num_tokens), generator=generator)
    return {"input_ids": ids, "labels": ids.clone()}


def packed_batch(lengths: list[int], seed: int = 0) -> dict[str, Tensor]:
    """Sequences one after another in a row, told apart by their positions."""
    result = batch(num_tokens=sum(lengths), seed=seed)
    result["position_ids"] = torch.cat([torch.arange(length) for length in lengths])[None]
    result["labels"][result["position_ids"] == 0] = -100
    return result


def padded_batch(lengths: list[int], seed: int = 0) -> dict[str, Tensor]:
    """Rows padded on the right to the longest."""
    result = batch(num_rows=len(lengths), num_tokens=max(lengths), seed=seed)
    result["attention_mask"] = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    result["labels"][result["attention_mask"] == 0] = -100
    return result


def left_padded(lengths: list[int], num_behind: int = 0, seed: int = 0) -> dict[str, Tensor]:
    """Rows padded on the left to the longest, and on the right by `num_behind`; their first tokens have no
    label."""
    result = padded_batch(lengths, seed)
    num_tokens = max(lengths) + num_behind
    for row, length in enumerate(lengths):
        result["labels"][row, 0] = -100
        for x in result.values():
            x[row] = x[row].roll(max(lengths) - length)
    fill = {"labels": -100, "input_ids": 1, "attention_mask": 0}
    padding = {key: x.new_full((len(lengths), num_behind), fill[key]) for key, x in result.items()}
    result = {key: torch.cat([x, padding[key]], 1) for key, x in result.items()}
    assert all(x.shape == (len(lengths), num_tokens) for x in result.values())
    return result


def with_positions(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Positions in the sequences, and 1 for padding, as `generate` has them."""
    mask = inputs["attention_mask"]
    return {**inputs, "position_ids": (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)}


def gradients(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """One step's loss and gradients, under the parameters' names; `loss` beside them."""
    model.zero_grad(set_to_none=True)
    loss = model(**inputs, use_cache=False).loss  # with a cache, transformers does not see packed segments
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **grads}


def gradients_alone(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """As `gradients`, of padded rows' sequences, each in a forward of its own."""
    model.zero_grad(set_to_none=True)
    num_labels = (inputs["labels"][:, 1:] != -100).sum()
    total = torch.zeros(())
    for is_real, ids, labels in zip(
        inputs["attention_mask"] == 1, inputs["input_ids"], inputs["labels"], strict=True
    ):
        own = labels[is_real][None]
        if (own[:, 1:] != -100).any():
            settings = {"num_items_in_batch": num_labels, "use_cache": False}
            loss = model(input_ids=ids[is_real][None], labels=own, **settings).loss
            loss.backward()
            total = total + loss.detach()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": total, **grads}


def largest_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Over all gradients, the norm of the difference relative to the norm expected. Losses, in fp32, must
    agree, too."""
    assert found.keys() == expected.keys()
    assert all(expected[name].norm() > 0 for name in expected), "a gradient that is zero shows nothing"
    torch.testing.assert_close(found["loss"], expected["loss"], rtol=1e-6, atol=0)
    return max(
        ((found[name] - expected[name]).norm() / expected[name].norm()).item()
        for name in expected
        if name != "loss"
    )
