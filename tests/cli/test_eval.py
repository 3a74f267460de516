"""`chunkdist eval`, run in this process, on a model that has learnt nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from chunkdist.cli.main import main
from tests.helpers.tiny_run import BYTE_LLAMA, command_line, make_model_folder

SMALL = ["--lengths", "320", "640", "--depths", "2", "--trials", "1", "--rows", "1"]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A config whose data has 800 bytes of text or more a sample."""
    rows = [{"text": f"def f{number}():\n    return {number}\n" * 40} for number in range(3)]
    options = command_line(make_model_folder(tmp_path / "model"), rows, max_length=640)
    pairs = zip(options[::2], options[1::2], strict=True)
    values = {
        key.removeprefix("--"): value if value == "no" else yaml.safe_load(value) for key, value in pairs
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**values, "long_samples": "truncate"}))
    return path


def saved_model(folder: Path, config: Path, seed: int = 0) -> Any:
    """A model as a run saves it."""
    torch.manual_seed(seed)
    values = yaml.safe_load(config.read_text())
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(values["model_name_or_path"]))
    for parameter in model.parameters():
        parameter.data *= 3
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(BYTE_LLAMA).save_pretrained(folder)
    return model


def result_of(folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / "eval.json").read_text())
    return result


def losses_of(folder: Path) -> list[float]:
    return [row["tail_loss"] for row in result_of(folder)["loss"]]


def test_a_table_a_picture_and_json(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved_model(tmp_path / "out", config)
    assert main(["eval", str(config), *SMALL, "--chunk_size", "100"]) == 0
    out = capsys.readouterr().out
    assert "loss by position" in out
    assert "many keys" in out
    assert "split 'train'" in out
    assert (tmp_path / "out" / "eval.png").read_bytes().startswith(b"\x89PNG")
    result = result_of(tmp_path / "out")
    assert result["chunk_size"] == 100
    assert [row["num_tokens"] for row in result["loss"]] == [320, 640]
    assert len(result["recall"]) == 3 * 2 * 2
    assert max(row["recall"] for row in result["recall"]) == 0, "nothing was learnt"


def test_lengths_go_up_to_context_length(config: Path, tmp_path: Path) -> None:
    few, into = ["--depths", "1", "--trials", "1", "--rows", "1"], ["--into", str(tmp_path / "found")]
    longer = ["--max_length", "320", "--context_length", "1280"]
    assert main(["eval", str(config), "--base", *few, *into, *longer]) == 0
    assert [row["num_tokens"] for row in result_of(tmp_path / "found")["loss"]] == [160, 320, 640, 1280]


def test_which_model(config: Path, tmp_path: Path) -> None:
    """The saved one, the one before training, adapters on it; and chunks change nothing."""
    model, folder = saved_model(tmp_path / "out", config), tmp_path / "found"
    into = ["--into", str(folder)]
    assert main(["eval", str(config), *SMALL, *into]) == 0
    of_saved = losses_of(folder)
    assert main(["eval", str(config), *SMALL, *into, "--chunk_method", "none"]) == 0
    assert losses_of(folder) == pytest.approx(of_saved, rel=1e-5)
    assert main(["eval", str(config), *SMALL, *into, "--base"]) == 0
    assert result_of(folder)["model"] == "the model before training"
    assert losses_of(folder) != pytest.approx(of_saved, rel=1e-2)

    torch.manual_seed(1)
    lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, lora)
    adapted.save_pretrained(tmp_path / "adapters")
    saved = ["--model_name_or_path", str(tmp_path / "out"), "--from_scratch", "false"]
    adapter = ["--adapter", str(tmp_path / "adapters")]
    assert main(["eval", str(config), *SMALL, *into, *saved, *adapter]) == 0
    of_adapters = losses_of(folder)
    own = [
        "--use_peft",
        "true",
        "--lora_r",
        "4",
        "--lora_target_modules",
        "q_proj",
        "v_proj",
    ]  # as in a run's config
    assert main(["eval", str(config), *SMALL, *into, *saved, *adapter, *own]) == 0
    assert losses_of(folder) == of_adapters
    adapted.merge_and_unload().save_pretrained(tmp_path / "out")
    assert main(["eval", str(config), *SMALL, *into]) == 0
    assert losses_of(folder) == pytest.approx(of_adapters, rel=1e-5)
    assert of_adapters != pytest.approx(of_saved, rel=1e-3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "holds no model: train first"),
        (["--adapter", "nowhere"], "has no adapter_config.json"),
        (["--base", "--lengths", "64"], "64 tokens are too few"),
        (["--base", "--lengths", "9000"], "the data has"),
        (["--base", "--lengths", "1"], "--lengths 1 leaves nothing"),
        (["--base", "--trials", "0"], "--trials 0 asks nothing"),
        (["--base", "--chunk_sise", "4"], "did you mean 'chunk_size'?"),
        (["--base", "--into", "run.yaml"], "run.yaml cannot be written to"),
        (["--base", "--adapter", "out"], "not allowed with argument"),
    ],
)
def test_a_fault_of_the_input_is_status_2_and_nothing_is_written(
    config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert main(["eval", str(config), *options]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert words in lines[-1]
    assert not any("Traceback" in line for line in lines)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(("num_layers", "words"), [(1, "lacks"), (3, "holds")])
def test_adapters_of_another_model(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], num_layers: int, words: str
) -> None:
    other = make_model_folder(tmp_path / "other", num_hidden_layers=num_layers)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(other))
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    get_peft_model(model, lora).save_pretrained(tmp_path / "adapters")
    assert main(["eval", str(config), *SMALL, "--adapter", str(tmp_path / "adapters")]) == 2
    assert f"adapters {words} " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
