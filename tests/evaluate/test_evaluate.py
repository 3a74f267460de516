"""Recall and loss by position: a model made by hand that recalls, the same without its memory, and logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
from trl.trainer.utils import add_fused_lm_head

import chunkdist.evaluate.recall
from chunkdist import ChunkConfig, chunk_model
from chunkdist.evaluate.documents import longest_first
from chunkdist.evaluate.measure import EvalSettings, Evaluation, evaluate
from chunkdist.evaluate.recall import KEYS, TASKS, recall_rows

NUM_TEXT_TOKENS, NUM_KEYS, VOCAB_SIZE = 8, 24, 64
FEW_KEYS = KEYS[:NUM_KEYS]


def encode(text: str) -> list[int]:
    """One token for a sentence up to its number, one for a number, one for its end."""
    if text == chunkdist.evaluate.recall.END:
        return [NUM_TEXT_TOKENS]
    if text.strip().isdecimal():
        return [NUM_TEXT_TOKENS + 1 + NUM_KEYS + int(text) % NUM_KEYS]
    (key,) = (number for number, key in enumerate(FEW_KEYS) if f" {key} " in text)
    return [NUM_TEXT_TOKENS + 1 + key]


def recalling_model() -> Any:
    """Llama of two layers, its weights written down: the first attends to the token before, the second to
    the tokens behind an earlier one that equals the last, and copies what it finds (Elhage et al. 2021).

    Hidden states: one-hot tokens in [0, 64), the token before in [64, 128), the answer in [128, 192), and a
    constant. The fast pairs of the rotary embedding tell places, the slow ones do not turn and hold tokens.
    """
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=128,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 1e12},
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    tokens, before, answer = (slice(start, start + 64) for start in (0, 64, 128))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.zero_()
        model.model.embed_tokens.weight[:, tokens] = torch.eye(64)
        model.model.embed_tokens.weight[:, 192] = 1.0
        first, second = (layer.self_attn for layer in model.model.layers)
        frequencies = 1e12 ** -(torch.arange(8) / 64)
        first.q_proj.weight[:8, 192] = 1.3
        first.k_proj.weight[:8, 192] = 1.3 * frequencies.cos()
        first.k_proj.weight[64:72, 192] = 1.3 * frequencies.sin()
        slow = [*range(32, 64), *range(96, 128)]
        second.q_proj.weight[slow, tokens] = 2 * torch.eye(64)
        second.k_proj.weight[slow, before] = 2 * torch.eye(64)
        for attention, target in ((first, before), (second, answer)):
            attention.v_proj.weight[:64, tokens] = 0.1 * torch.eye(64)
            attention.o_proj.weight[target, :64] = torch.eye(64)
        model.lm_head.weight[:, answer] = 2 * torch.eye(64)
    return model.eval()


def documents_of(*lengths: int) -> list[tuple[list[int], list[int]]]:
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(NUM_TEXT_TOKENS, (n,), generator=generator).tolist() for n in lengths]
    return [(ids, ids) for ids in documents]


@torch.no_grad()
def token_losses(model: Any, ids: list[int]) -> Tensor:
    """Of the tokens from the second on, by all logits."""
    logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
    return F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")


def evaluated(model: Any, chunk_size: int | None = 32) -> Evaluation:
    add_fused_lm_head(model, outputs=("log_probs", "is_top1"))
    if chunk_size is not None:
        chunk_model(model, ChunkConfig(chunk_size=chunk_size))
    return evaluate(model, documents_of(600, 700), encode, EvalSettings(lengths=(128, 512)))


@pytest.fixture(autouse=True)
def few_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunkdist.evaluate.recall, "KEYS", FEW_KEYS)


@pytest.mark.parametrize("chunk_size", [32, None], ids=["chunks", "plain"])
def test_a_model_that_recalls_shows_it(chunk_size: int | None) -> None:
    found = evaluated(recalling_model(), chunk_size)
    for task in TASKS:
        assert found.share(task.name) == 1, task.name
    assert len(found.recall) == 3 * 2 * 5
    assert all(x.num_answers == x.num_answer_tokens == 2 for x in found.recall)


@pytest.mark.parametrize("layer", [0, 1], ids=["no token before", "no copy"])
def test_one_that_does_not_recall_does_not(layer: int) -> None:
    model = recalling_model()
    model.model.layers[layer].self_attn.o_proj.weight.data.zero_()
    found = evaluated(model)
    assert max(found.share(task.name) for task in TASKS) < 0.2


def test_a_window_shows_in_the_depth() -> None:
    """A model that sees 200 tokens recalls what stands in them."""
    model = recalling_model()

    def windowed(module: Any, q: Any, k: Any, v: Any, mask: Any, **kwargs: Any) -> tuple[Any, None]:
        places = torch.arange(q.shape[2])
        distance = places[:, None] - places
        seen = (distance >= 0) & (distance < 200)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=kwargs["scaling"])
        return out.transpose(1, 2), None

    AttentionInterface.register("windowed_in_a_test", windowed)
    model.set_attn_implementation("windowed_in_a_test")
    found = evaluated(model, chunk_size=None)
    assert found.share("one needle", 128) == 1
    assert [found.share("one needle", 512, depth) for depth in (0.0, 0.25, 0.5, 0.75, 1.0)] == [0, 0, 0, 1, 1]


def test_loss_by_position_is_that_of_the_logits() -> None:
    torch.manual_seed(0)
    model = recalling_model()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    documents = documents_of(600, 3000, 1500)
    whole = torch.stack([token_losses(model, ids[:1400]) for ids, _ in documents[1:]])
    short = torch.stack([token_losses(model, ids[1272:1400]) for ids, _ in documents[1:]])
    add_fused_lm_head(model, outputs=("log_probs", "is_top1"))
    chunk_model(model, ChunkConfig(chunk_size=100))
    settings = EvalSettings(lengths=(128, 1400), num_trials=1)
    found = evaluate(model, documents, encode, settings)
    assert (found.num_rows, found.num_joined) == (2, 0)
    first, second = found.losses
    assert list(first.by_position) == ["0-1K"]
    assert list(second.by_position) == ["0-1K", "1-4K"]
    all_of_it, rest = second.by_position.values()
    assert all_of_it == pytest.approx(float(whole[:, :1023].mean()), rel=1e-5)
    assert rest == pytest.approx(float(whole[:, 1023:].mean()), rel=1e-5)
    assert second.tail == pytest.approx(float(whole[:, -64:].mean()), rel=1e-5)
    assert first.tail == pytest.approx(float(short[:, -64:].mean()), rel=1e-5)


def test_labels_and_the_start_of_a_sequence() -> None:
    """Tokens without a label are not in the mean; where text begins in the middle, what sequences start with
    is put before it."""
    model = recalling_model()
    add_fused_lm_head(model, outputs=("log_probs", "is_top1"))
    ids = documents_of(400)[0][0]
    labels = [-100] * 350 + ids[350:]
    settings = EvalSettings(lengths=(128, 400), num_trials=1)
    found = evaluate(model, [(ids, labels)], encode, settings, start=[9])
    expected = token_losses(model, [9, *ids[273:]])[-50:].mean()
    assert found.losses[0].by_position["0-1K"] == pytest.approx(float(expected), rel=1e-5)


class TestRows:
    def rows(self, name: str, **given: Any) -> Any:
        (task,) = (task for task in TASKS if task.name == name)
        text = list(range(100, 900))
        settings = {"num_tokens": 300, "depths": (0.0, 0.5, 1.0), "seed": "0", **given}
        return recall_rows(task, text=text, encode=encode, start=[99], **settings)

    def test_needles_stand_where_they_should(self) -> None:
        for row, depth in zip(self.rows("one needle"), (0.0, 0.5, 1.0), strict=True):
            (question,) = row.questions
            assert len(row.ids) == 300
            assert row.ids[0] == 99
            prompt, answer = row.ids[question.start - 1], row.ids[question.start]
            place = row.ids.index(prompt)
            assert row.ids[place + 1] == answer
            assert place == 1 + round(depth * (300 - 7))
            text = [token for token in row.ids[1:] if token >= 100]
            assert text == list(range(text[0], text[0] + 293))

    def test_many_keys_are_asked_for_in_any_order(self) -> None:
        (row,) = self.rows("many keys", num_tokens=700)
        assert len(row.ids) == 700
        needles = [token for token in row.ids if 9 <= token < 9 + NUM_KEYS]
        assert len(needles) == 2 * 3 + 700 // 256
        assert {question.depth for question in row.questions} == {0.0, 0.5, 1.0}
        assert self.rows("many keys", num_tokens=700) == [row], "the same seed, the same rows"
        assert self.rows("many keys", num_tokens=700, seed="1") != [row]

    @pytest.mark.parametrize(
        ("given", "words"),
        [({"num_tokens": 18}, "too few for 3 needle"), ({"num_tokens": 900}, "the data has 800")],
    )
    def test_what_cannot_be_asked(self, given: dict[str, Any], words: str) -> None:
        with pytest.raises(ValueError, match=words):
            self.rows("several needles", **given)


def test_the_longest_documents_come_first_and_short_ones_are_joined() -> None:
    documents = [([number] * length, [number] * length) for number, length in enumerate((30, 100, 60, 50))]
    found = longest_first(documents, num_tokens=80, num_rows=3)
    assert [row[0] for row in found.rows] == [[1] * 80, [2] * 60 + [3] * 20]
    assert found.num_joined == 1
    with pytest.raises(ValueError, match="has 240 tokens"):
        longest_first(documents, num_tokens=241, num_rows=1)
