"""The studies' ways to train are what the docs say they are."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from chunkdist import ChunkConfig, chunk_model
from tests.helpers.models import gradients, largest_difference
from tests.helpers.tiny_run import ROOT, load_script


@pytest.fixture(scope="module")
def study() -> ModuleType:
    return load_script(ROOT / "docs" / "studies" / "distant_recall.py")


def model_of(study: ModuleType) -> Any:
    torch.manual_seed(0)
    model = study.new_model(0).double()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


class Truncated:
    """A sampler that keeps every chunk, and nothing that later ones leave for its keys and values."""

    def draw(self, scores: Tensor) -> Tensor:
        return torch.eye(len(scores), dtype=torch.float64)


@dataclass
class Weights:
    """A sampler that has drawn."""

    weights: Tensor

    def draw(self, scores: Tensor) -> Tensor:
        return self.weights


SAMPLES = {
    "truncated": (8, 1.0),
    "exact": (8, 1.0),
    "SpaCO, 1/2 of the chunks": (8, [2.0, 0.0, 2.0, 2.0] * 2),
    "SpaCO, 1/4 of the tokens": (1, [4.0, 0.0, 4.0, 0.0] * 16),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_weighed_gradients_are_those_of_chunks(study: ModuleType, name: str) -> None:
    (arm,) = (arm for arm in study.ARMS if arm.name == name)
    part, drawn = SAMPLES[name]
    weights = torch.as_tensor(drawn, dtype=torch.float64).expand(64 // part)
    ids, record = (x[:, 32:] for x in study.far(2, 96, torch.Generator().manual_seed(0)))
    inputs = {"input_ids": ids, "labels": ids.masked_fill(record < 0, -100)}
    sampler = Truncated() if name == "truncated" else Weights(weights)
    model = model_of(study)
    chunk_model(model, ChunkConfig(chunk_size=part, sampler=sampler, control_variate=False))
    expected = gradients(model, inputs)
    model = model_of(study)
    weighed = study.WeighedModel(model, arm.part)
    weighed.weights = weights.repeat_interleave(part).expand(2, -1)
    weighed.relays = weighed.weights * arm.relays
    found = gradients(model, inputs)
    assert largest_difference(found, expected) < 1e-10
    weighed.weights = weighed.relays = torch.ones(2, 64, dtype=torch.float64)
    assert (largest_difference(gradients(model, inputs), expected) > 0.01) == (name != "exact")


def test_truncation_detaches_what_earlier_chunks_have_written(study: ModuleType) -> None:
    ids = study.far(2, 96, torch.Generator().manual_seed(0))[0][:, 32:]
    model = model_of(study)
    cache = DynamicCache(config=model.config)
    logits = []
    for start in range(0, 64, study.CHUNK_SIZE):
        part = ids[:, start : start + study.CHUNK_SIZE]
        logits.append(model(input_ids=part, past_key_values=cache, use_cache=True).logits)
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
    loss = F.cross_entropy(torch.cat(logits, 1)[:, :-1].mT, ids[:, 1:])
    loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()} | {
        "loss": loss.detach().float()
    }
    model = study.chunked(model_of(study), Truncated())
    assert largest_difference(gradients(model, {"input_ids": ids, "labels": ids}), expected) < 1e-6


@pytest.mark.parametrize("corpus", ["far", "near"])
def test_answers_are_those_of_the_records(study: ModuleType, corpus: str) -> None:
    ids, records = study.CORPORA[corpus](4, 96, torch.Generator().manual_seed(0))
    assert ids.shape == records.shape == (4, 96)
    places = (records >= 0).nonzero().tolist()
    assert len(places) == 4 * study.NUM_KEYS
    in_one_chunk = 0
    for row, place in places:
        record = int(records[row, place])
        key, value = divmod(int(ids[row, record]), study.NUM_VALUES)
        assert ids[row, place - 1] == study.FIRST_KEY + key
        assert ids[row, place] == study.FIRST_VALUE + value
        in_one_chunk += record // study.CHUNK_SIZE == (place - 1) // study.CHUNK_SIZE
    assert in_one_chunk == 0 if corpus == "far" else 0.15 < in_one_chunk / len(places) < 0.7


def test_a_sample_is_right_on_average(study: ModuleType) -> None:
    (arm,) = (arm for arm in study.ARMS if arm.name == "SpaCO, 1/4 of the tokens")
    weighed = study.WeighedModel(study.new_model(0), arm.part)
    torch.manual_seed(0)
    weighed.draw(arm, torch.Size((400, 64)))
    assert set(weighed.weights.unique().tolist()) == {0.0, 4.0}
    assert weighed.weights.mean() == pytest.approx(1, abs=0.05)
