"""What is read from the mask functions of transformers, and what is refused."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor
from transformers import masking_utils

from chunkdist import ChunkConfig, UnsupportedModelError, chunk_model
from chunkdist.attention.function import ATTENTION_NAME
from chunkdist.attention.mask import ChunkMask
from tests.helpers.model_zoo import tiny_model


def config(**changes: object) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(attn_implementation=ATTENTION_NAME, **changes)


def made_by(create: str, position_ids: Tensor | None = None, **kwargs: object) -> ChunkMask:
    changes = {key: kwargs.pop(key) for key in ("sliding_window", "attention_chunk_size") if key in kwargs}
    mask = getattr(masking_utils, create)(
        config=config(**changes),
        inputs_embeds=torch.zeros(1, 6, 8),
        attention_mask=kwargs.pop("attention_mask", None),
        past_key_values=None,
        position_ids=position_ids,
        **kwargs,
    )
    assert isinstance(mask, ChunkMask)
    return mask


PACKED = torch.tensor([[0, 1, 2, 0, 1, 2]])


@pytest.mark.parametrize("position_ids", [None, torch.arange(6)[None], PACKED])
@pytest.mark.parametrize("attention_mask", [None, torch.tensor([[1, 1, 1, 1, 0, 0]])])
def test_known_kinds(position_ids: Tensor | None, attention_mask: Tensor | None) -> None:
    inputs = {"position_ids": position_ids, "attention_mask": attention_mask}
    assert made_by("create_causal_mask", **inputs) == ChunkMask()
    windowed = made_by("create_sliding_window_causal_mask", sliding_window=3, **inputs)
    assert windowed == ChunkMask(window=3)
    blocked = made_by("create_chunked_causal_mask", attention_chunk_size=4, **inputs)
    assert blocked == ChunkMask(block=4)


def test_a_second_window_narrows() -> None:
    narrow = masking_utils.sliding_window_overlay(2)
    assert made_by("create_causal_mask", and_mask_function=narrow) == ChunkMask(window=2)
    mask = made_by("create_sliding_window_causal_mask", sliding_window=3, and_mask_function=narrow)
    assert mask == ChunkMask(window=2)


def test_image_tokens() -> None:
    """Tokens of one image see each other; without images there is nothing to refuse."""
    text, image = torch.full((1, 6), -1), torch.tensor([[-1, 0, 0, 0, -1, -1]])
    assert made_by("create_causal_mask", block_sequence_ids=text) == ChunkMask()
    assert made_by("create_causal_mask", block_sequence_ids=image).unsupported is not None


@pytest.mark.parametrize(
    ("create", "changes"),
    [
        ("create_bidirectional_mask", {}),
        ("create_causal_mask", {"or_mask_function": lambda batch, head, q, kv: kv < 3}),  # prefix LM
        ("create_causal_mask", {"and_mask_function": lambda batch, head, q, kv: kv % 2 == 0}),
        ("create_bidirectional_sliding_window_mask", {}),
    ],
)
def test_other_masks_are_refused_where_they_are_used(create: str, changes: dict[str, object]) -> None:
    inputs_embeds = torch.zeros(1, 6, 8)
    inputs = {"config": config(sliding_window=3), "inputs_embeds": inputs_embeds, "attention_mask": None}
    if create == "create_causal_mask":
        inputs["past_key_values"] = None
    mask = getattr(masking_utils, create)(**inputs, **changes)
    assert mask.unsupported is not None


def test_a_mask_is_no_tensor() -> None:
    mask = ChunkMask()
    scores = torch.zeros(2, 2)
    for compute in (
        lambda: mask[:, :, :3],
        lambda: mask.shape,
        lambda: scores + mask,
        lambda: scores.masked_fill(mask, 0),
        lambda: torch.where(mask, scores, scores),
    ):
        with pytest.raises(UnsupportedModelError, match="mask"):
            compute()


def test_a_bidirectional_model_is_refused() -> None:
    model = tiny_model("LlamaForCausalLM").float()
    model.config.is_causal = False
    input_ids = torch.randint(8, 64, (1, 20))
    with pytest.raises(UnsupportedModelError, match="later tokens"):
        chunk_model(model, ChunkConfig(chunk_size=7))(input_ids=input_ids, labels=input_ids)


def test_image_tokens_of_a_model_are_refused() -> None:
    model = chunk_model(tiny_model("Gemma3ForConditionalGeneration").float(), ChunkConfig(chunk_size=7))
    input_ids = torch.randint(8, 64, (1, 20))
    token_type_ids = torch.zeros_like(input_ids)
    model(input_ids=input_ids, token_type_ids=token_type_ids, labels=input_ids).loss.backward()
    token_type_ids[0, 5:11] = 1
    with pytest.raises(UnsupportedModelError, match="see each other both ways"):
        model(input_ids=input_ids, token_type_ids=token_type_ids, labels=input_ids)
