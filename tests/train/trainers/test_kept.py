"""No work is lost: a run that goes on is the same run, the best model is the one that is saved, and weights
reach the disk whatever else fails."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedConfig, TrainerCallback

from chunkdist.train import ending
from chunkdist.train.checkpoints.run_record import RECORD
from chunkdist.train.checkpoints.whole import UNFINISHED
from chunkdist.train.trainers.kept import KeptTrainer
from tests.helpers.tiny_run import ROOT, TEXTS, command_line, load_script, make_model_folder

ROWS = TEXTS[:2] * 4
SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 5, "chunk_check": False}
BEST = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "dataset_test_split": "train",
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss",
    "greater_is_better": True,  # so that the first is the best
}


@pytest.fixture(scope="module")
def launcher() -> Any:
    return load_script(ROOT / "launchers" / "train.py")


@pytest.fixture(scope="module")
def ended(launcher: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and the run that has trained it, to its end."""
    model = make_model_folder(tmp_path_factory.mktemp("ended") / "model")
    assert run(launcher, model) == 0
    return model


@pytest.fixture
def model(ended: Path, tmp_path: Path) -> Path:
    shutil.copytree(ended.parent, tmp_path / "copy")
    return tmp_path / "copy" / "model"


def run(launcher: Any, model: Path, **values: Any) -> int:
    values = {"report_to": "none", "long_samples": "split", **SAVING, **values}
    return int(launcher.main(command_line(model, ROWS, **values)))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("chunkdist: ")]
    return line


# A run that goes on


def test_the_first_start_of_a_command_that_resumes_begins(
    launcher: Any, model: Path, ended: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(model.parent / "out")
    assert run(launcher, model, resume_from_checkpoint=True) == 0
    assert "this run has no checkpoint yet, it begins" in capsys.readouterr().out
    assert_equal(weights(model.parent / "out"), weights(ended.parent / "out"))


@pytest.mark.parametrize("length", [{"max_steps": 5}, {"max_steps": -1, "num_train_epochs": 1}])
def test_a_run_resumed_at_its_end_stays_there(
    launcher: Any, model: Path, length: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    out = model.parent / "out"
    if length["max_steps"] < 0:
        shutil.rmtree(out)
        assert run(launcher, model, **length) == 0
    expected, steps = weights(out), sorted(path.name for path in out.glob("checkpoint-*"))
    for _ in range(3):
        assert run(launcher, model, resume_from_checkpoint=True, **length) == 0
        assert_equal(weights(out), expected)
    assert sorted(path.name for path in out.glob("checkpoint-*")) == steps
    if length["max_steps"] > 0:
        assert "all 5 steps are done: nothing is left to train" in capsys.readouterr().out


def test_a_run_with_other_options_is_refused(
    launcher: Any, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for values, said in (
        ({"learning_rate": 0.5}, "learning_rate was 0.01 and is 0.5"),
        ({"optim": "sgd"}, "optim was adamw_torch_fused and is sgd"),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps was 1 and is 4"),
        ({"seed": 1, "weight_decay": 0.5}, "seed was 42 and is 1; weight_decay was 0.0 and is 0.5"),
        ({"chunk_method": "spaco"}, "chunk_method was seco or none and is spaco"),
        ({"max_length": 32}, "training samples (dataset_name, max_length, tokenizer, chat template) was"),
    ):
        assert run(launcher, model, resume_from_checkpoint=True, **values) == 2
        line = error_line(capsys)
        assert said in line
        assert "checkpoint-5 cannot go on" in line
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    assert run(launcher, model, resume_from_checkpoint=True) == 2
    assert "base weights (model_name_or_path) was" in error_line(capsys)


def test_what_does_not_change_the_training_may_differ(
    launcher: Any, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = model.parent / "out"
    expected = weights(out)
    shutil.rmtree(out / "checkpoint-5")
    moved = model.rename(model.with_name("moved"))
    free = {"logging_steps": 2, "save_steps": 1, "chunk_size": 32, "layers_per_group": "all"}
    assert run(launcher, moved, resume_from_checkpoint=True, **free) == 0
    for name, value in weights(out).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-4)
    assert run(launcher, moved, resume_from_checkpoint=True, max_steps=6) == 0
    assert "max_steps was 5 and is 6: from here on the learning rate" in capsys.readouterr().out


def test_the_count_of_tokens_goes_on(launcher: Any, model: Path) -> None:
    def counts() -> list[float]:
        rows = [
            json.loads(line) for line in (model.parent / "out" / "metrics.jsonl").read_text().splitlines()
        ]
        return [row["num_tokens"] for row in rows if "loss" in row]

    expected = counts()
    assert expected == sorted(set(expected))
    shutil.rmtree(model.parent / "out" / "checkpoint-5")
    assert run(launcher, model, resume_from_checkpoint=True) == 0
    assert counts() == expected


def test_a_flipped_byte_is_not_resumed_from(
    launcher: Any, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = model.parent / "out"
    expected = weights(out)
    path = out / "checkpoint-5" / "optimizer.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert run(launcher, model, resume_from_checkpoint=True) == 0
    said = capsys.readouterr().out
    assert "checkpoint-4 (passed over: checkpoint-5: optimizer.pt is not what was saved: its checksum" in said
    assert_equal(weights(out), expected)


def test_a_run_that_is_killed_ends_as_one_that_is_not(launcher: Any, model: Path, ended: Path) -> None:
    """Once before its first step, once in the middle; then to its end, in this process."""
    out = model.parent / "out"
    shutil.rmtree(out)
    values = {"report_to": "none", "long_samples": "split", **SAVING, "resume_from_checkpoint": True}
    command = [sys.executable, str(ROOT / "launchers" / "train.py"), *command_line(model, ROWS, **values)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 600  # of a machine that has other things to do
    while not (out / "checkpoint-2").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    time.sleep(random.Random(os.getpid()).random() * 0.3)  # in a step, or in a save
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (out / "checkpoint-2").exists()
    assert run(launcher, model, resume_from_checkpoint=True) == 0
    assert_equal(weights(out), weights(ended.parent / "out"))
    assert not (out / UNFINISHED).exists()


# The best model


def test_the_best_evaluation_is_what_is_saved(launcher: Any, model: Path) -> None:
    """Though checkpoints are saved more rarely than it is evaluated."""
    for save_steps, left in ((1, [1, 3]), (2, [1, 3])):
        out = model.parent / f"best-{save_steps}"
        values = {"save_steps": save_steps, "max_steps": 3, "save_total_limit": 1, "output_dir": out}
        assert run(launcher, model, **BEST, **values) == 0
        assert sorted(int(path.name.split("-")[1]) for path in out.glob("checkpoint-*")) == left
        assert_equal(weights(out), weights(out / "checkpoint-1"))
        state = json.loads((out / "checkpoint-3" / "trainer_state.json").read_text())
        assert state["best_model_checkpoint"] == str(out / "checkpoint-1")


def test_the_best_evaluation_of_a_run_that_goes_on_elsewhere(
    launcher: Any, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its folder was moved, or it goes on in one with a checkpoint of the same step of another run; and its
    best checkpoint is lost."""
    values = {**BEST, "save_steps": 1, "max_steps": 3, "lr_scheduler_type": "constant"}
    first, moved, other = (model.parent / name for name in ("first", "moved", "other"))
    assert run(launcher, model, **{**values, "load_best_model_at_end": False}, seed=7, output_dir=other) == 0
    assert run(launcher, model, **values, output_dir=first) == 0
    from_first = {**values, "resume_from_checkpoint": first / "checkpoint-2", "output_dir": other}
    assert run(launcher, model, **from_first) == 0
    assert_equal(weights(other), weights(first / "checkpoint-1"))
    first.rename(moved)
    (moved / "model.safetensors").unlink()
    at_its_end = {**values, "resume_from_checkpoint": True, "output_dir": moved}
    assert run(launcher, model, **at_its_end) == 0
    assert_equal(weights(moved), weights(moved / "checkpoint-1"))
    shutil.rmtree(moved / "checkpoint-1")
    assert run(launcher, model, **at_its_end) != 0
    assert "checkpoint-1, of the best evaluation, is not there any more" in capsys.readouterr().err


def test_a_callback_finds_the_checkpoint_that_was_saved(
    launcher: Any, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []

    class Looks(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            found.append((folder / RECORD).exists() and (folder / "optimizer.pt").exists())

    real = KeptTrainer.__init__

    def init(self: Any, **kwargs: Any) -> None:
        real(self, **kwargs)
        self.add_callback(Looks())

    monkeypatch.setattr(KeptTrainer, "__init__", init)
    assert run(launcher, model, output_dir=model.parent / "looked") == 0
    assert found == [True, True, True]


# What fails at the end


@pytest.mark.parametrize("peft", [False, True])
def test_the_weights_are_saved_whatever_else_is_not(
    launcher: Any,
    model: Path,
    peft: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A config that can be written before training and not after it; the first checkpoint does not end the
    run."""
    values: dict[str, Any] = {"output_dir": model.parent / "partly"}
    if peft:
        shutil.copy(model.parent / "out" / "model.safetensors", model)
        values |= {"use_peft": True, "lora_target_modules": "all-linear"}
    trained: list[dict[str, torch.Tensor]] = []
    real_train = KeptTrainer.train

    def fail(self: Any, *given: Any, **kwargs: Any) -> None:
        raise ValueError("The generation config instance is invalid")

    def train(self: Any, *given: Any, **kwargs: Any) -> Any:
        from peft import PeftConfig

        monkeypatch.setattr(PeftConfig if peft else PreTrainedConfig, "save_pretrained", fail)
        result = real_train(self, *given, **kwargs)
        trained.append({name: value.clone() for name, value in self.model.state_dict().items()})
        return result

    monkeypatch.setattr(KeptTrainer, "train", train)
    assert run(launcher, model, **values) == 1
    out = model.parent / "partly"
    line = error_line(capsys)
    assert f"the trained weights are saved to {out}, but not the " in line
    assert "config.json" in line
    assert (out / "tokenizer.json").exists()
    saved = load_file(out / ("adapter_model.safetensors" if peft else "model.safetensors"))
    assert saved
    for name, value in saved.items():
        inside = name.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default.")
        assert torch.equal(value, trained[0][inside if peft else name]), name
    assert len(list(out.glob("checkpoint-*"))) == 3


def test_a_tracker_that_fails_at_the_end_loses_no_weights(
    launcher: Any,
    model: Path,
    ended: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(self: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(KeptTrainer, "_finish_current_push", fail)
    out = model.parent / "untold"
    assert run(launcher, model, output_dir=out) == 1
    assert "but what follows a training failed: ConnectionError: no network" in error_line(capsys)
    assert_equal(weights(out), weights(ended.parent / "out"))
    monkeypatch.setattr(KeptTrainer, "_load_best_model", fail)  # then they are not what was asked for
    with pytest.raises(ConnectionError):
        run(launcher, model, output_dir=model.parent / "not-the-best", **BEST)


# Nothing trained


def test_weights_that_are_no_numbers_are_not_saved(
    launcher: Any, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = model.parent / "nan"
    assert run(launcher, model, output_dir=out, learning_rate=1e30, save_strategy="no") == 3
    assert "training ended with weights that are NaN or infinite, which are not saved" in error_line(capsys)
    assert not list(out.glob("*.safetensors"))


def test_a_run_without_a_step_is_told(
    launcher: Any, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = KeptTrainer._run_epoch
    monkeypatch.setattr(KeptTrainer, "_run_epoch", lambda self, **_: None)
    out = model.parent / "nothing"
    assert run(launcher, model, output_dir=out) == 3
    assert "nothing was trained, no step was taken: no model is saved" in error_line(capsys)
    assert not list(out.glob("*.safetensors"))
    monkeypatch.setattr(KeptTrainer, "_run_epoch", real)
    skips = property(lambda self: True)
    monkeypatch.setattr("accelerate.Accelerator.optimizer_step_was_skipped", skips)
    assert run(launcher, model, output_dir=out) == 3
    assert "all 5 steps were skipped for their gradients" in error_line(capsys)


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_last_loss_that_is_no_number_is_told(
    loss: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ending, "save_model", lambda trainer: tmp_path)
    history = [{"loss": 1.0}, {"loss": loss}, {"train_loss": 1.0}]
    trainer: Any = SimpleNamespace(
        args=SimpleNamespace(output_dir=tmp_path),
        state=SimpleNamespace(global_step=2, max_steps=2, log_history=history),
        steps_taken=2,
        first_step=0,
        model_wrapped=torch.nn.Linear(2, 2),
        end_failure=None,
    )
    assert ending.end_run(trainer).status == 3
    assert f"its weights, which are finite, are in {tmp_path}" in ending.end_run(trainer).line
    history[1] = {"loss": 0.5}
    assert ending.end_run(trainer) == ending.Ending()


# What is in no file


def test_no_key_to_the_hub_is_written(launcher: Any, model: Path) -> None:
    out = model.parent / "secret"
    assert run(launcher, model, output_dir=out, hub_token="hf_secret") == 0
    files = [path for path in out.rglob("*") if path.is_file()]
    pickled = {path.parent.name for path in files if path.name == "training_args.bin"}
    assert pickled >= {out.name, "checkpoint-4"}
    for path in files:
        assert b"hf_secret" not in path.read_bytes(), path
