"""Image-text models: towers attend with their own kernels, and every gradient is the plain model's, fp64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from chunkdist import ChunkConfig, UnsupportedModelError, chunk_model, unchunk_model
from chunkdist.chunking import chunk_report, num_computed
from tests.helpers.image_zoo import image_rows, tiny_image_model
from tests.helpers.models import with_lora
from tests.helpers.sweep import double_precision

QWEN3 = "Qwen3VLForConditionalGeneration"
NAMES = ["Qwen2_5_VLForConditionalGeneration", QWEN3, "SmolVLMForConditionalGeneration"]


@pytest.fixture(autouse=True)
def in_double() -> Iterator[None]:
    with double_precision(), torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def gradients(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    model(**inputs).loss.backward()  # and no use_cache=False
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    assert found.keys() == truth.keys()
    floor = 1e-6 * max(float(x.norm()) for x in truth.values())  # some are zero but for rounding
    assert max(float((found[key] - x).norm() / (x.norm() + floor)) for key, x in truth.items()) < 1e-10


def tower_of(model: PreTrainedModel) -> nn.Module:
    inner: Any = model.model
    tower: nn.Module = getattr(inner, "visual", None) or inner.vision_model
    return tower


def frozen_tower(model: PreTrainedModel) -> PreTrainedModel:
    tower_of(model).requires_grad_(False)
    return model


def lora(model: PreTrainedModel) -> Any:
    return with_lora(model, target_modules=["q_proj", "v_proj"])  # the decoder's, and some towers'


@pytest.mark.parametrize("made", [frozen_tower, lora])
@pytest.mark.parametrize("settings", [{}, {"retained_chunks": 2}, {"offload": "host"}])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_trained(name: str, settings: dict[str, Any], made: Callable[..., Any]) -> None:
    model = made(tiny_image_model(name))
    inputs = image_rows(model.get_base_model() if hasattr(model, "get_base_model") else model)
    truth = gradients(model, inputs)
    chunk_model(model, ChunkConfig(chunk_size=7, attention="math", **settings))
    assert_same(gradients(model, inputs), truth)
    unchunk_model(model)
    assert_same(gradients(model, inputs), truth)


def test_a_tower_under_its_own_checkpointing() -> None:
    """Its memory is then that of one of its layers."""
    model = tiny_image_model(QWEN3)
    inputs = image_rows(model)
    truth = gradients(model, inputs)
    chunk_model(model, ChunkConfig(chunk_size=7, attention="math"))
    tower_of(model).gradient_checkpointing_enable()  # type: ignore[operator]
    assert_same(gradients(model, inputs), truth)


def test_the_tower_has_its_own_kernel() -> None:
    model = tiny_image_model("LlavaForConditionalGeneration")
    model.set_attn_implementation({"vision_config": "sdpa", "text_config": "eager"})
    inputs = image_rows(model)
    truth = gradients(model, inputs)
    chunk_model(model, ChunkConfig(chunk_size=7, attention="math"))
    seen: dict[str, set[str]] = {}

    def look(module: Any, args: Any) -> None:
        seen.setdefault(type(module).__name__, set()).add(module.config._attn_implementation)

    for module in model.modules():
        if type(module).__name__.endswith("Attention"):
            module.register_forward_pre_hook(look)
    assert_same(gradients(model, inputs), truth)
    assert seen == {"CLIPAttention": {"sdpa"}, "LlamaAttention": {"chunkdist"}}
    assert chunk_report(model).attention == "math"


def test_features_between_layers_want_groups_of_one() -> None:
    model = chunk_model(tiny_image_model(QWEN3), ChunkConfig(chunk_size=7, layers_per_group=2))
    inputs = image_rows(model)
    with pytest.raises(
        UnsupportedModelError, match="changes the hidden states between its layers: write layers_"
    ):
        model(**inputs)
    text = {key: inputs[key] for key in ("input_ids", "attention_mask", "labels")}
    text["input_ids"] = text["input_ids"].clamp(min=8)
    model(**text).loss.backward()


def test_auto_takes_groups_of_one_there() -> None:
    model = tiny_image_model(QWEN3)
    inputs = image_rows(model)
    truth = gradients(model, inputs)
    chunk_model(model, ChunkConfig(chunk_size=7, layers_per_group="auto"))
    assert_same(gradients(model, inputs), truth)
    assert chunk_report(model).layers_per_group == 1


def test_images_that_see_themselves_both_ways_are_refused() -> None:
    model = tiny_image_model("Gemma3ForConditionalGeneration")
    inputs = image_rows(model)
    chunk_model(model, ChunkConfig(chunk_size=7))
    with pytest.raises(UnsupportedModelError, match="tokens of one image see each other both ways"):
        model(**inputs)
    inputs["token_type_ids"] = torch.zeros_like(inputs["token_type_ids"])
    text = {key: x for key, x in inputs.items() if key != "pixel_values"}
    text["input_ids"] = text["input_ids"].clamp(min=8)
    model(**text).loss.backward()


def test_a_row_of_several_images() -> None:
    """A video as many images: one row, and chunks that hold the end of one and the beginning of the next."""
    model = tiny_image_model(QWEN3)
    rows = image_rows(model)
    num_real = int(rows["attention_mask"][1].sum())
    names = ("input_ids", "labels", "mm_token_type_ids")
    inputs = {key: torch.cat([rows[key][0], rows[key][1, :num_real]])[None] for key in names}
    inputs |= {key: rows[key] for key in ("pixel_values", "image_grid_thw")}
    truth = gradients(model, inputs)
    chunk_model(model, ChunkConfig(chunk_size=7, attention="math"))
    assert_same(gradients(model, inputs), truth)


def test_equal_ids_are_not_equal_images() -> None:
    """Rows that begin alike are computed once, but not where their ids stand for other images."""
    model = tiny_image_model("LlavaForConditionalGeneration")
    inputs = image_rows(model)
    inputs["input_ids"], inputs["labels"] = (inputs[key][:1].repeat(2, 1) for key in ("input_ids", "labels"))
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    truth = gradients(model, inputs)
    chunk_model(model, ChunkConfig(chunk_size=7, attention="math"))
    assert_same(gradients(model, inputs), truth)
    unchunk_model(model)
    chunk_model(model, ChunkConfig(chunk_size=7, share_prefixes=True))
    with pytest.raises(ValueError, match="share_prefixes=True, but pixel_values is not cut by tokens"):
        model(**inputs)


@pytest.mark.parametrize("name", [*NAMES, "LlavaForConditionalGeneration"])
def test_left_padding_with_images(name: str) -> None:
    """Rows become a stream once embeddings of images are in their places."""
    model = tiny_image_model(name)
    inputs = left_padded(image_rows(model))
    truth = gradients(model, inputs)
    chunk_model(model, ChunkConfig(chunk_size=7, attention="math"))
    assert_same(gradients(model, inputs), truth)
    assert num_computed(model) == int(inputs["attention_mask"].sum())


def test_left_padding_is_refused_where_a_mask_is_made_first() -> None:
    model = tiny_image_model("PaliGemmaForConditionalGeneration")
    inputs = left_padded(image_rows(model))
    chunk_model(model, ChunkConfig(chunk_size=7))
    with pytest.raises(ValueError, match=r"left padding, and pixel_values is not cut by tokens, and .* gets"):
        model(**inputs)


def left_padded(rows: dict[str, Tensor]) -> dict[str, Tensor]:
    """The second row's padding goes to its beginning."""
    mask = rows["attention_mask"]
    num_padded = int((mask[1] == 0).sum())
    shifted = {
        key: torch.stack([x[0], x[1].roll(num_padded)]) for key, x in rows.items() if x.shape == mask.shape
    }
    shifted["labels"][1, num_padded] = -100
    return {**rows, **shifted}
