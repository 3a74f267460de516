"""Padding: equal to the plain model where nothing is predicted from it, refused where something is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config

from chunkdist import ChunkConfig, UnsupportedModelError, chunk_model
from chunkdist.check.gradients import check_gradients
from tests.helpers.models import (
    VOCAB_SIZE,
    gradients,
    gradients_alone,
    largest_difference,
    left_padded,
    padded_batch,
    tiny_llama,
    with_lora,
    with_positions,
)

CONFIG = ChunkConfig(chunk_size=7)
REFUSAL = r"labels of padding .* are not -100: .* write labels\[attention_mask == 0\] = -100, and with left"


def with_labels_on_padding() -> dict[str, Tensor]:
    inputs = padded_batch([37, 20])
    return {**inputs, "labels": inputs["input_ids"].clone()}


def shifted(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    labels = torch.nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:].contiguous()
    return {**inputs, "shift_labels": labels}


@pytest.mark.parametrize("chunk_size", [7, 100])
@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("make", [tiny_llama, lambda: with_lora(tiny_llama())], ids=["full", "LoRA"])
def test_labels_on_padding_are_refused(make: Any, is_training: bool, chunk_size: int) -> None:
    model = chunk_model(make(), ChunkConfig(chunk_size=chunk_size)).train(is_training)
    inputs = with_labels_on_padding()
    for refused in (inputs, shifted(inputs), {**inputs, "attention_mask": inputs["attention_mask"].float()}):
        with pytest.raises(ValueError, match=REFUSAL), torch.set_grad_enabled(is_training):
            model(**refused)


def test_one_label_in_the_middle_of_padding() -> None:
    inputs = padded_batch([37, 20])
    inputs["labels"][1, 30] = 3
    with pytest.raises(ValueError, match=REFUSAL):
        chunk_model(tiny_llama(), CONFIG)(**inputs)


def test_labels_by_their_place() -> None:
    inputs = with_labels_on_padding()
    positional = inputs["input_ids"], inputs["attention_mask"], None, None, None, inputs["labels"]
    with pytest.raises(ValueError, match=REFUSAL):
        chunk_model(tiny_llama(), CONFIG)(*positional)


def test_another_index_that_is_ignored() -> None:
    inputs = padded_batch([37, 20])
    inputs["labels"][inputs["labels"] == -100] = 0
    model = chunk_model(tiny_llama(), CONFIG)
    with pytest.raises(ValueError, match="labels of padding"):
        model(**inputs)
    found, expected = (gradients(x, {**inputs, "ignore_index": 0}) for x in (model, tiny_llama()))
    assert largest_difference(found, expected) < 1e-10


def end_of_sequence() -> dict[str, Tensor]:
    """The first padded token has a label, which the last real one predicts: an end that is the padding."""
    inputs = padded_batch([37, 20])
    inputs["labels"][1, 20] = 5
    return inputs


def row_of_padding() -> dict[str, Tensor]:
    inputs = padded_batch([37, 20])
    inputs["attention_mask"][1], inputs["labels"][1] = 0, -100
    return inputs


def with_columns(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Positions that count the padding."""
    return {
        **inputs,
        "position_ids": torch.arange(inputs["input_ids"].shape[1]).expand_as(inputs["input_ids"]),
    }


def mask(change: Any) -> dict[str, Tensor]:
    inputs = padded_batch([37, 20])
    return {**inputs, "attention_mask": change(inputs["attention_mask"])}


def all_ones() -> dict[str, Tensor]:
    inputs = with_labels_on_padding()
    return {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}


EQUAL = {
    "the end of a sequence": end_of_sequence,
    "the same, shifted": lambda: shifted(end_of_sequence()),
    "a row of padding": row_of_padding,
    "left padding, and positions": lambda: with_positions(left_padded([37, 20, 1])),
    "padding on both sides": lambda: with_positions(left_padded([30, 20], num_behind=7)),
    "left padding, and positions of columns": lambda: with_columns(left_padded([37, 20])),
    "a mask of floats": lambda: mask(lambda x: x.float()),
    "a mask of booleans": lambda: mask(lambda x: x.bool()),
    "a mask of other numbers": lambda: mask(lambda x: 3 * x),
    "a mask of ones": all_ones,
    "no mask": lambda: {key: x for key, x in all_ones().items() if key != "attention_mask"},
}


@pytest.mark.parametrize("name", EQUAL)
@pytest.mark.parametrize("height", [1, "all"])
def test_equal_to_the_plain_model(name: str, height: Any) -> None:
    model = chunk_model(tiny_llama(), ChunkConfig(chunk_size=7, layers_per_group=height))
    found, expected = (gradients(x, EQUAL[name]()) for x in (model, tiny_llama()))
    assert largest_difference(found, expected) < 1e-10


@pytest.mark.parametrize(
    "change",
    [
        lambda x: torch.ones(2, 1, 37, 37, dtype=torch.bool).tril(),
        lambda x: x[:, :20],
        lambda x: torch.where(torch.arange(37) == 9, 0, x),
        lambda x: {"full_attention": None},
    ],
    ids=["four dims", "too short", "a gap", "a dict"],
)
def test_other_masks_are_refused(change: Any) -> None:
    with pytest.raises(ValueError, match="attention_mask"):
        chunk_model(tiny_llama(), CONFIG)(**mask(change))


@pytest.mark.parametrize("height", [1, "all"])
def test_positions_that_are_not_passed_begin_with_the_sequence(height: Any) -> None:
    """The plain model counts the padding: the same up to the rounding of cosines, which are in fp32."""
    inputs = left_padded([20, 37, 1], num_behind=3)
    model = chunk_model(tiny_llama(), ChunkConfig(chunk_size=7, layers_per_group=height))
    found = gradients(model, inputs)
    assert largest_difference(found, gradients_alone(tiny_llama(), inputs)) < 1e-10
    assert largest_difference(found, gradients(tiny_llama(), inputs)) < 1e-5


def test_a_first_token_behind_left_padding_has_no_label() -> None:
    inputs = left_padded([37, 20])
    inputs["labels"][1, 17] = 3
    for refused in (inputs, shifted(inputs)):
        with pytest.raises(ValueError, match=REFUSAL):
            chunk_model(tiny_llama(), CONFIG)(**refused)


def test_learned_positions_count_the_padding_unless_they_are_passed() -> None:
    settings = {"vocab_size": VOCAB_SIZE, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
    config = GPT2Config(**settings, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)

    def model() -> Any:
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).double()

    inputs = left_padded([37, 20])
    with pytest.raises(
        ValueError, match=r"GPT2Model has no rotary embedding.* position_ids=\(attention_mask"
    ):
        chunk_model(model(), CONFIG)(**inputs)
    inputs = with_positions(inputs)
    found, expected = (gradients(x, inputs) for x in (chunk_model(model(), CONFIG), model()))
    assert largest_difference(found, expected) < 1e-6  # its own softmax is in fp32


@pytest.mark.parametrize("is_left", [True, False])
def test_hidden_states_of_all_layers_come_back_in_rows(is_left: bool) -> None:
    inputs = left_padded([37, 20]) if is_left else padded_batch([37, 20])
    del inputs["labels"]
    models = tiny_llama(), chunk_model(tiny_llama(), CONFIG)
    with torch.no_grad():
        plain, found = (x(**inputs, output_hidden_states=True, use_cache=False) for x in models)
    is_real = inputs["attention_mask"] == 1
    for x, y in zip((*plain.hidden_states, plain.logits), (*found.hidden_states, found.logits), strict=True):
        torch.testing.assert_close(y[is_real], x[is_real], rtol=1e-4, atol=1e-4)
        assert y.shape == x.shape


def test_an_argument_whose_tokens_cannot_be_told() -> None:
    inputs = padded_batch([37, 20])
    with pytest.raises(UnsupportedModelError, match=r"the decoder gets other of shape \(3, 37\) with rows"):
        chunk_model(tiny_llama(), CONFIG).model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            other=torch.arange(111).view(3, 37),
        )


def test_padding_is_not_computed() -> None:
    seen = []
    model = chunk_model(tiny_llama(), CONFIG)
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    gradients(model, left_padded([30, 20, 3], num_behind=7))
    forward, rerun = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert [sum(shape[1] for shape in x) for x in (forward, rerun)] == [53, 53]


def test_a_forward_that_failed_leaves_no_labels() -> None:
    model = chunk_model(tiny_llama(), CONFIG)
    with pytest.raises(ValueError, match=REFUSAL):
        model(**with_labels_on_padding())
    inputs = with_labels_on_padding()
    inputs.pop("labels")
    model(**inputs)
    model.model(**inputs)


def own_loss(model: Any, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
    logits = model(**inputs).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())


OF_PADDING = {
    "labels": lambda model, inputs: own_loss(model, inputs, inputs["input_ids"]),
    "logits beside the loss": lambda model, inputs: (
        (out := model(**inputs, labels=padded_batch([37, 20])["labels"])).loss
        + out.logits.logsumexp(-1).square().mean()
    ),
    "hidden states": lambda model, inputs: model.model(**inputs).last_hidden_state.square().mean(),
    "a tuple": lambda model, inputs: model.model(**inputs, return_dict=False)[0].square().mean(),
}


@pytest.mark.parametrize("name", OF_PADDING)
@pytest.mark.parametrize("chunk_size", [7, 100])
def test_a_loss_of_padding_is_refused_in_its_backward(name: str, chunk_size: int) -> None:
    model, inputs = chunk_model(tiny_llama(), ChunkConfig(chunk_size=chunk_size)), padded_batch([37, 20])
    inputs.pop("labels")
    loss = OF_PADDING[name](model, inputs)
    with pytest.raises(ValueError, match="a loss takes hidden states or logits of padding"):
        loss.backward()


def test_a_loss_of_ones_own_without_padding() -> None:
    found = []
    for model in (tiny_llama(), chunk_model(tiny_llama(), CONFIG)):
        inputs = padded_batch([37, 20])
        labels = inputs.pop("labels")
        (loss := own_loss(model, inputs, labels)).backward()
        found.append({"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}})
        model.zero_grad()
        own_loss(
            model, {"input_ids": inputs["input_ids"]}, inputs["input_ids"]
        ).backward()  # nothing is padded
    assert largest_difference(found[1], found[0]) < 1e-10


def test_a_loss_that_is_not_a_number_is_not_said_to_be_of_padding() -> None:
    model = chunk_model(tiny_llama(), CONFIG)
    (model(**padded_batch([37, 20])).loss * float("nan")).backward()


def test_the_gradient_check_refuses() -> None:
    with pytest.raises(ValueError, match=REFUSAL):
        check_gradients(tiny_llama(num_layers=2, dtype=torch.float32), with_labels_on_padding(), CONFIG)
