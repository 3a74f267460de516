"""The launcher, from the command line to a model that loads; and every kind of bad input, before anything is
written."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from chunkdist.train import run
from tests.helpers.tiny_run import (
    ASSISTANT,
    CHAT_TEMPLATE,
    ROOT,
    TEXTS,
    USER,
    command_line,
    load_script,
    make_model_folder,
)

LAUNCHER = ROOT / "launchers" / "train.py"
FITTING = TEXTS[:2] * 4


@pytest.fixture(scope="module")
def launcher() -> Any:
    return load_script(LAUNCHER)


def train(launcher: Any, model: Path, rows: list[dict[str, Any]], **values: Any) -> Path:
    assert launcher.main(command_line(model, rows, **values)) == 0
    return Path(values.get("output_dir", model.parent / "out"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder).state_dict())


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(
            value, other[name], rtol=0, atol=2e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


def fault(launcher: Any, capsys: pytest.CaptureFixture[str], arguments: Sequence[str]) -> str:
    """The one line of a run that is refused."""
    capsys.readouterr()
    assert launcher.main(arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("chunkdist: ")]
    assert len(lines) == 1
    return lines[0]


# Runs that end well


def test_a_chunked_run_ends_where_the_plain_one_does(launcher: Any, tiny_model: Path, tmp_path: Path) -> None:
    common = {"packing": True, "long_samples": "split", "max_steps": 5, "gradient_accumulation_steps": 2}
    plain = train(
        launcher, tiny_model, TEXTS * 4, chunk_method="none", output_dir=tmp_path / "plain", **common
    )
    chunked = train(launcher, tiny_model, TEXTS * 4, output_dir=tmp_path / "chunked", **common)
    assert_same(weights(plain), weights(chunked))
    untrained = train(
        launcher, tiny_model, TEXTS * 4, output_dir=tmp_path / "zero", learning_rate=0.0, **common
    )
    assert any(
        (weights(untrained)[name] - value).abs().max() > 1e-2 for name, value in weights(plain).items()
    )
    tokenizer = AutoTokenizer.from_pretrained(chunked)
    assert tokenizer.decode(tokenizer("é = 1")["input_ids"]) == "é = 1"


def test_spaco_trains_and_says_what_it_kept(launcher: Any, tiny_model: Path, tmp_path: Path) -> None:
    values = {
        "chunk_method": "spaco",
        "spaco_sampler": "importance",
        "spaco_budget": 2,
        "gradient_accumulation_steps": 2,
    }
    out = train(
        launcher,
        tiny_model,
        TEXTS * 4,
        packing=True,
        long_samples="split",
        output_dir=tmp_path / "spaco",
        **values,
    )
    for line in (out / "metrics.jsonl").read_text().splitlines():
        figures = json.loads(line)
        assert 0 <= figures["spaco_chunks_kept"] <= figures["spaco_chunks"] <= 8, (
            "two micro-batches of four chunks"
        )
        assert figures["spaco_tokens_kept"] <= 2 * 64
        assert figures["spaco_largest_weight"] >= 0
        assert figures["spaco_relative_variance"] >= 0


def test_lora_on_messages_with_evaluation_between(launcher: Any, tiny_model: Path, tmp_path: Path) -> None:
    base = train(launcher, tiny_model, FITTING, output_dir=tmp_path / "base")
    (tmp_path / "template.jinja").write_text(CHAT_TEMPLATE)
    data = tmp_path / "chat"
    data.mkdir()
    for split in ("train", "test"):
        (data / f"{split}.jsonl").write_text(json.dumps({"messages": [USER, ASSISTANT]}) + "\n")
    common = {
        "use_peft": True,
        "lora_dropout": 0.0,
        "lora_target_modules": "all-linear",
        "dataset_name": data,
        "max_steps": 3,
        "chat_template_path": tmp_path / "template.jinja",
        "assistant_only_loss": True,
        "eval_strategy": "steps",
        "eval_steps": 1,
    }
    states = []
    for method in ("none", "seco"):
        out = train(launcher, base, [], chunk_method=method, output_dir=tmp_path / method, **common)
        assert not (out / "model.safetensors").exists()
        states.append(AutoPeftModelForCausalLM.from_pretrained(out).state_dict())
    assert_same(*states)
    assert any(value.abs().max() > 0 for name, value in states[1].items() if "lora_B" in name)


def test_a_run_resumed_from_a_checkpoint_ends_where_the_whole_one_does(
    launcher: Any, tiny_model: Path, tmp_path: Path
) -> None:
    common = {
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "data_seed": 1,
        "output_dir": tmp_path / "out",
    }
    whole = weights(train(launcher, tiny_model, FITTING, seed=5, **common))
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    for resume in (tmp_path / "out" / "checkpoint-2", True):
        resumed = train(launcher, tiny_model, FITTING, seed=5, resume_from_checkpoint=resume, **common)
        assert_same(whole, weights(resumed))
        shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    # Another seed, other weights to begin with: it ends elsewhere.
    afresh = weights(train(launcher, tiny_model, FITTING, **common))
    assert any((afresh[name] - value).abs().max() > 1e-2 for name, value in whole.items())


def test_the_default_config_trains(launcher: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    arguments = [
        "--config",
        "configs/quickstart.yaml",
        "--output_dir",
        str(tmp_path / "out"),
        "--max_steps",
        "6",
    ]
    small = [
        "--max_length",
        "512",
        "--chunk_size",
        "128",
        "--corpus_max_bytes",
        "60000",
        "--report_to",
        "none",
    ]
    assert (
        launcher.main([*arguments, *small, "--use_cpu", "--warmup_steps", "1", "--save_strategy", "steps"])
        == 0
    )
    state = json.loads((tmp_path / "out" / "checkpoint-6" / "trainer_state.json").read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert losses[-1] < losses[0] - 0.5
    num_parameters = sum(
        value.numel() for name, value in weights(tmp_path / "out").items() if name != "lm_head.weight"
    )
    assert 2_000_000 < num_parameters < 4_000_000


# Runs that are refused


def chat(folder: Path) -> list[str]:
    return command_line(folder, [{"messages": [USER, ASSISTANT]}])


def broken_line(folder: Path) -> list[str]:
    arguments = command_line(folder, TEXTS[:2])
    with (folder.parent / "data.jsonl").open("a") as file:
        file.write("{broken\n")
    return arguments


FAULTS: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "unknown option": (lambda m: command_line(m, TEXTS, chunk_sise=3), "did you mean 'chunk_size'"),
    "chunk size": (lambda m: command_line(m, FITTING, chunk_size=0), "chunk_size=0"),
    "group height": (lambda m: command_line(m, FITTING, layers_per_group=3), "layers_per_group=3"),
    "method": (lambda m: command_line(m, FITTING, chunk_method="ceco"), "invalid choice: 'ceco'"),
    "missing file": (lambda m: command_line(m, FITTING, dataset_name="./no.jsonl"), "does not exist"),
    "broken line": (broken_line, "data.jsonl, line 3: not JSON"),
    "no column": (lambda m: command_line(m, [{"question": "a"}]), "no usable column, only question"),
    "long sample": (lambda m: command_line(m, TEXTS), "sample 2 is the first with 155"),
    "no supervised token": (
        lambda m: command_line(m, [{"input_ids": [1, 2], "labels": [-100, -100]}]),
        "sample 0: no sup",
    ),
    "no chat template": (chat, "no chat template"),
    "split": (lambda m: command_line(m, FITTING, dataset_train_split="dev"), "dataset_train_split='dev'"),
    "packing": (
        lambda m: command_line(m, FITTING, packing=True, packing_strategy="wrapped"),
        "attend to each other",
    ),
    "left padding": (
        lambda m: command_line(m, [{"input_ids": [0, 1, 2], "attention_mask": [0, 1, 1]}]),
        "padded on the left",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_bad_input_is_one_line_and_leaves_nothing(
    launcher: Any, tiny_model: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    make_arguments, message = FAULTS[name]
    assert message in fault(launcher, capsys, make_arguments(tiny_model))
    assert not (tiny_model.parent / "out").exists()


def test_a_model_that_cannot_be_chunked_is_one_line(
    launcher: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mamba = {"model_type": "mamba", "architectures": ["MambaForCausalLM"], "state_size": 4}
    model = make_model_folder(tmp_path / "model", **mamba)
    assert "MambaBlock is not exact in chunks" in fault(launcher, capsys, command_line(model, FITTING))
    assert not (tmp_path / "out").exists()


def test_a_failed_gradient_check_stops_the_run(
    launcher: Any, tiny_model: Path, monkeypatch: Any, capsys: Any
) -> None:
    class Failed:
        passed = False

        def report(self) -> str:
            return "layers.0: 12 % off"

    seen = []
    monkeypatch.setattr(run, "check_gradients", lambda model, batch, config: seen.append(batch) or Failed())
    assert launcher.main(command_line(tiny_model, FITTING)) == 1
    assert "layers.0: 12 % off" in capsys.readouterr().out
    assert seen[0]["input_ids"].shape == (1, 23)
    assert not (tiny_model.parent / "out" / "config.json").exists()
    assert launcher.main(command_line(tiny_model, FITTING, chunk_check=False)) == 0


def test_the_gradient_check_meets_a_hook_that_looks_at_other_tokens(
    launcher: Any, tiny_model: Path, monkeypatch: Any, capsys: Any
) -> None:
    check = run.check_gradients

    def steered(model: Any, batch: Any, config: Any) -> Any:
        mlp = model.model.layers[0].mlp
        mlp.register_forward_hook(lambda module, args, output: output + output.mean(1, keepdim=True))
        return check(model, batch, config)

    monkeypatch.setattr(run, "check_gradients", steered)
    assert "on mlp of layer 0" in fault(launcher, capsys, command_line(tiny_model, FITTING))
    assert not (tiny_model.parent / "out").exists()


# Processes of their own


def start(command: list[str], *, threads: int = 1, **options: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    environment.pop("PYTEST_XDIST_WORKER", None)
    return subprocess.run(
        command,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        stdin=subprocess.DEVNULL,
        check=False,
        **options,
    )


def test_bad_input_has_no_traceback_and_status_2(tiny_model: Path) -> None:
    done = start([sys.executable, str(LAUNCHER), *command_line(tiny_model, TEXTS)])
    assert done.returncode == 2
    assert "sample 2 is the first with 155" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_full_disk_is_one_line_and_leaves_no_half_written_model(tmp_path: Path) -> None:
    """A limit on the size of files stands in for the full disk: weights pass it, everything else does not."""
    model = make_model_folder(tmp_path / "model", hidden_size=128, intermediate_size=512)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))

    done = start([sys.executable, str(LAUNCHER), *command_line(model, FITTING)], preexec_fn=limit)
    assert done.returncode == 2, done.stderr
    assert "no space left to save the trained model" in done.stderr
    assert "Traceback" not in done.stderr
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert not left & {"config.json", "model.safetensors", ".unfinished-model"}


def test_accelerate_starts_one_process(tiny_model: Path, tmp_path: Path) -> None:
    """Launchers of several: tests/distributed/test_launch.py."""
    accelerate = Path(sys.executable).with_name("accelerate")
    preset = str(ROOT / "configs" / "accelerate" / "single.yaml")
    done = start(
        [
            str(accelerate),
            "launch",
            "--config_file",
            preset,
            str(LAUNCHER),
            *command_line(tiny_model, FITTING),
        ]
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "model saved to" in done.stdout
    assert weights(tmp_path / "out")
