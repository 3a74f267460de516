"""`context_length`: what the table says, what is saved, and what is said of rows that are too long."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from chunkdist.cli.main import main as cli
from chunkdist.models.context_length import made_for
from chunkdist.train.run import run
from tests.distributed.launched import save_initial_model
from tests.helpers.tiny_run import TEXTS, command_line, make_model_folder

ROWS = TEXTS * 2
SCALED = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
VALUES: dict[str, Any] = {"long_samples": "split", "report_to": "none", "context_length": 64, "max_steps": 1}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Made for 16 tokens."""
    folder = make_model_folder(tmp_path / "model", max_position_embeddings=16)
    save_initial_model(folder)
    return folder


def train(model: Path, **values: Any) -> Path:
    assert run("sft", command_line(model, ROWS, **{**VALUES, **values})) == 0
    return model.parent / "out"


def test_the_saved_model_is_set_up(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = train(model)
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "context 64 tokens llama3 by factor 4, from 16 tokens: Llama 3.1's" in said
    assert "warning" not in said
    config = json.loads((out / "config.json").read_text())
    assert config["rope_parameters"] == SCALED
    assert config["max_position_embeddings"] == 64
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.model.rotary_emb.rope_type == "llama3"
    assert made_for(loaded.config) == 64


def test_adapters_have_the_config_of_their_base(model: Path) -> None:
    """The same logits as in training, of the base model with the config beside the adapters."""
    out = train(model, use_peft=True, lora_target_modules="all-linear", learning_rate=0.1)
    config = AutoConfig.from_pretrained(out)
    assert config.rope_parameters == SCALED
    ids = torch.arange(60)[None]
    logits = []
    for given in ({"config": config}, {}):
        base = AutoModelForCausalLM.from_pretrained(model, **given)
        logits.append(PeftModel.from_pretrained(base, str(out)).eval()(ids).logits)
    assert not torch.allclose(*logits, atol=1e-3)


def test_rows_that_are_too_long_for_the_model(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(model, context_length=32, chunk_method="none")
    said = capsys.readouterr().out
    assert said.count("warning: max_length=64 is above context_length=32") == 1
    arguments = command_line(model, ROWS, **{**VALUES, "output_dir": model.parent / "other"})
    at = arguments.index("--context_length")
    del arguments[at : at + 2]
    assert run("sft", arguments) == 0
    said = capsys.readouterr().out
    assert said.count("max_length=64 is above what the model was made for, 16 tokens") == 1
    assert "write context_length: 64" in said


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"context_length": 0}, "context_length=0: write 1 or more"),
        ({"rope_extension": "longest"}, "rope_extension"),
        ({"rope_extension": "ntk", "max_length": 32}, ""),
    ],
)
def test_options(
    values: dict[str, Any], message: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = run("sft", command_line(model, ROWS, **{**VALUES, **values}))
    assert status == (2 if message else 0)
    assert message in capsys.readouterr().err


def test_an_extension_without_a_length(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("sft", command_line(model, ROWS, report_to="none", rope_extension="yarn")) == 2
    assert "rope_extension=yarn without context_length" in capsys.readouterr().err


def test_a_plan_refuses_as_the_run_does(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((model / "config.json").read_text())
    config["rope_parameters"] = SCALED
    (model / "config.json").write_text(json.dumps(config))
    file = model.parent / "run.yaml"
    file.write_text(
        f"model_name_or_path: {model}\ndataset_name: data.jsonl\noutput_dir: out\nmax_length: 128\n"
        "context_length: 128\nrope_extension: yarn\n"
    )
    assert cli(["plan", str(file), "--card", "rtx3090"]) == 2
    assert "is scaled by llama3 already" in capsys.readouterr().err
