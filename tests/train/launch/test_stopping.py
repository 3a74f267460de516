"""A run that is told to stop: in one process, and what signals do before, in and after training."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from chunkdist.train.checkpoints.files import fault_of
from chunkdist.train.launch import stopping
from chunkdist.train.launch.stopping import STOPPED, Stopped, StopSignals, keep_workers
from chunkdist.train.trainers.checked import CheckedSFTTrainer
from tests.helpers.tiny_run import ROOT, TEXTS, command_line, load_script

OPTIONS: dict[str, Any] = {
    "max_steps": 5,
    "long_samples": "split",
    "chunk_check": False,
    "report_to": "none",
    "lr_scheduler_type": "linear",
}


@pytest.fixture(scope="module")
def launcher() -> Any:
    return load_script(ROOT / "launchers" / "train.py")


@contextmanager
def told_in(monkeypatch: pytest.MonkeyPatch, method: str, step: int, number: int) -> Iterator[list[int]]:
    """In step `step`, this process is sent a signal when `method` begins. Gives the steps that were begun."""
    real, steps = getattr(CheckedSFTTrainer, method), []

    def tell(self: Any, *args: Any, **kwargs: Any) -> Any:
        steps.append(self.state.global_step + 1 if hasattr(self, "state") else 0)
        if steps[-1] == step:
            os.kill(os.getpid(), number)
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(CheckedSFTTrainer, method, tell)
        yield steps


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("chunkdist: ")]


def steps_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder).state_dict())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_saves_the_step_and_goes_on_to_the_bit(
    launcher: Any,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
) -> None:
    """Also where checkpoints are asked for without the optimizer's states, and an epoch ends with the run."""
    assert launcher.main(command_line(tiny_model, TEXTS * 2, **OPTIONS, output_dir=tmp_path / "whole")) == 0
    before = [signal.getsignal(number) for number in stopping.SIGNALS]
    options = {**OPTIONS, "save_strategy": "epoch", "save_only_model": True, "save_total_limit": 1}
    with told_in(monkeypatch, "training_step", 3, number) as begun:
        status = launcher.main(command_line(tiny_model, TEXTS * 2, **options))
    assert status == STOPPED
    assert begun == [1, 2, 3]
    assert [signal.getsignal(number) for number in stopping.SIGNALS] == before
    out = tmp_path / "out"
    assert steps_of(out) == ["checkpoint-3"]
    assert fault_of(out / "checkpoint-3") is None
    assert not (out / "model.safetensors").exists(), "the run is not over"
    notice, said = lines(capsys)[-2:]
    assert number.name in notice
    assert said == (
        f"chunkdist: stopped by {number.name}, checkpoint-3 saved: run the same command with "
        "resume_from_checkpoint: true to go on"
    )
    assert launcher.main(command_line(tiny_model, TEXTS * 2, **OPTIONS, resume_from_checkpoint=True)) == 0
    whole, resumed = weights(tmp_path / "whole"), weights(out)
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name
    logged = [
        json.loads(line)["loss"]
        for line in (out / "metrics.jsonl").read_text().splitlines()
        if "loss" in line
    ]
    assert len(logged) == 5, "the step that was stopped has its figures, too"


def test_an_evaluation_is_not_waited_for(
    launcher: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "both"
    data.mkdir()
    for split in ("train", "test"):
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in TEXTS * 2))
    options = {**OPTIONS, "eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 1}
    with told_in(monkeypatch, "prediction_step", 3, signal.SIGTERM) as evaluated:
        status = launcher.main(command_line(tiny_model, TEXTS, **{**options, "dataset_name": data}))
    assert status == STOPPED
    assert evaluated == [3], "the first of its batches after step 2 was the last"
    assert fault_of(tmp_path / "out" / "checkpoint-2") is None


def test_a_run_whose_last_step_it_is_ends(
    launcher: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with told_in(monkeypatch, "training_step", 5, signal.SIGTERM):
        assert launcher.main(command_line(tiny_model, TEXTS, **OPTIONS)) == 0
    assert weights(tmp_path / "out")


def test_a_signal_before_training_and_without_the_option_saves_nothing(
    launcher: Any,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with told_in(monkeypatch, "_prepare_dataset", 0, signal.SIGINT):
        assert launcher.main(command_line(tiny_model, TEXTS, **OPTIONS)) == 128 + signal.SIGINT
    assert lines(capsys) == ["chunkdist: stopped by SIGINT: before the first step, nothing was saved"]
    assert not (tmp_path / "out").exists()
    with told_in(monkeypatch, "training_step", 2, signal.SIGTERM):
        status = launcher.main(command_line(tiny_model, TEXTS, **OPTIONS, enable_jit_checkpoint=False))
    assert status == 128 + signal.SIGTERM
    assert "enable_jit_checkpoint: false" in lines(capsys)[-1]
    assert not steps_of(tmp_path / "out")


def sleep_when_seen(runs: Any) -> None:
    runs.set()
    time.sleep(60)


def test_what_was_ignored_stays_ignored_and_a_forked_child_has_its_own_signals() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        stop = StopSignals.start()
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        context = multiprocessing.get_context("fork")
        runs = context.Event()
        child = context.Process(target=sleep_when_seen, args=(runs,), daemon=True)
        child.start()
        assert runs.wait(60)
        child.terminate()
        child.join(20)
        assert child.exitcode == -signal.SIGTERM
        time.sleep(0.2)
        assert stop.told == 0
        stop.close()
    finally:
        signal.signal(signal.SIGINT, before)


STUCK = """
import ctypes
from chunkdist.train.launch import stopping
stopping._SAME_S = 1.0
stop = stopping.StopSignals.start()
stop.is_training = True
print("ready", flush=True)
mutex = ctypes.create_string_buffer(64)
for _ in range(2):
    ctypes.CDLL(None).pthread_mutex_lock(mutex)  # the second waits for ever, and no signal wakes it
"""


@pytest.mark.slow
def test_a_second_signal_ends_a_process_that_runs_no_python() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)  # the same once more, by its launcher
        time.sleep(1.5)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=10)
        assert process.returncode == 128 + signal.SIGTERM
        assert "ended at once, nothing was saved" in said
    finally:
        process.kill()


def test_a_loaders_workers_outlive_a_signal_until_the_run_leaves() -> None:
    stop = multiprocessing.sharedctypes.RawValue("b", 0)
    loader: DataLoader[int] = DataLoader(list(range(100)), num_workers=1, persistent_workers=True)  # type: ignore[arg-type]
    keep_workers(loader, stop)
    keep_workers(loader, stop)
    batches = iter(loader)
    next(batches)
    (worker,) = batches._workers  # type: ignore[attr-defined]
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(worker.pid, number)
    time.sleep(0.3)
    assert [int(batch) for batch in batches] == list(range(1, 100))
    stop.value = 1
    os.kill(worker.pid, signal.SIGTERM)
    worker.join(20)
    assert worker.exitcode == 0


def test_a_stop_is_no_failure() -> None:
    assert not issubclass(Stopped, Exception)
