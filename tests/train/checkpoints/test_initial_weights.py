"""Models from files: whole, as TRL loads them; what is missing is refused, or said where it is allowed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from trl.trainer.utils import create_model_from_path

from chunkdist.train.checkpoints.initial_weights import load_model


@pytest.fixture
def saved(tiny_model: Path) -> Path:
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(tiny_model)
    AutoModelForCausalLM.from_config(config).save_pretrained(tiny_model)
    return tiny_model


def load(folder: Path, **values: Any) -> Any:
    return load_model(str(folder), **{"allow_missing": False, "device_map": None, **values})


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def assert_same(one: Any, other: Any) -> None:
    states = one.state_dict(), other.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_a_whole_model_is_the_one_that_trl_loads(saved: Path) -> None:
    plain = create_model_from_path(str(saved), device_map=None)
    assert_same(load(saved), plain)
    assert load(saved, dtype="bfloat16").dtype == torch.bfloat16


def test_shards_and_pickled_weights_are_taken(saved: Path) -> None:
    plain = load(saved)
    state = load_file(saved / "model.safetensors")
    (saved / "model.safetensors").unlink()
    plain.save_pretrained(saved, max_shard_size="4KB")
    assert len(list(saved.glob("*.safetensors"))) > 2
    assert_same(load(saved), plain)
    for path in saved.glob("model*"):
        path.unlink()
    torch.save(state, saved / "pytorch_model.bin")
    assert_same(load(saved), plain)


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_head_that_is_the_embedding_is_not_missing(saved: Path, is_tied: bool) -> None:
    change_config(saved, tie_word_embeddings=is_tied)
    state = load_file(saved / "model.safetensors")
    state.pop("lm_head.weight", None)
    save_file(state, saved / "model.safetensors", metadata={"format": "pt"})
    if is_tied:
        load(saved)
    else:
        with pytest.raises(ValueError, match=r"lack 1 weight\(s\) \(lm_head\.weight\)"):
            load(saved)


def test_what_is_missing_is_said_where_it_is_allowed(saved: Path, capsys: Any) -> None:
    before = load(saved)
    change_config(saved, num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"lack 9 weight\(s\) .* write allow_missing_weights: true"):
        load(saved)
    model = load(saved, allow_missing=True)
    assert model.config.num_hidden_layers == 3
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, before.model.layers[1].mlp.up_proj.weight)
    assert "lack 9 weight(s) (model.layers.2." in capsys.readouterr().out
    change_config(saved, num_hidden_layers=2, intermediate_size=64)
    with pytest.raises(ValueError, match=r"6 weight\(s\) have another shape"):
        load(saved)
    assert load(saved, ignore_mismatched_sizes=True).config.intermediate_size == 64


def test_a_full_memory_is_not_the_files_fault(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from chunkdist.train.checkpoints import initial_weights as weights

    def fill(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(weights, "create_model_from_path", fill)
    with pytest.raises(torch.OutOfMemoryError):
        load(saved)
