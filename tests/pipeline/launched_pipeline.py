"""The launcher with a pipeline, inside ranks that stay."""

from __future__ import annotations

import gc
import io
import json
import os
import signal
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import distributed, nn
from transformers import PreTrainedModel

from chunkdist.config import ChunkConfig
from chunkdist.pipeline.plan import PipelinePlan
from chunkdist.pipeline.stage import ModelStage
from chunkdist.pipeline.step import Pipeline
from chunkdist.train.launch import failures
from chunkdist.train.trainers.pipeline import PipelineSFTTrainer
from tests.helpers.tiny_run import ROOT, command_line, load_script

Failure = Literal["raises", "is killed", "hangs"]


def arguments_of(folder: Path, rows: list[dict[str, Any]], **options: Any) -> list[str]:
    """A run of the model in `folder / "model"`, into `folder / "out"`."""
    options = {"long_samples": "split", "report_to": "none", "data_seed": 3, **options}
    return command_line(folder / "model", rows, **options)


def launch(arguments: list[str]) -> tuple[int, str]:
    """One run on every rank: the exit status, and what was said on stderr."""
    from accelerate.state import AcceleratorState

    launcher = load_script(ROOT / "launchers" / "train.py")
    before = os.environ.pop("ACCELERATE_USE_CPU", None)
    torch.manual_seed(0)  # of adapters; a process begins with it
    destroy, distributed.destroy_process_group = distributed.destroy_process_group, lambda: None
    try:
        with redirect_stderr(io.StringIO()) as said:
            status: int = launcher.main(arguments)
    finally:
        distributed.destroy_process_group = destroy
        if before is not None:
            os.environ["ACCELERATE_USE_CPU"] = before
        AcceleratorState._reset_state(True)
        gc.collect()
        store: Any = distributed.distributed_c10d._get_default_store()
        distributed.barrier()
        if distributed.get_rank() == 0:
            store.delete_key(failures._FIRST)  # ranks go on here
        distributed.barrier()
    return status, said.getvalue()


def launch_and_choose(arguments: list[str]) -> tuple[PipelinePlan, str]:
    """The plan of a run, and what it has printed before its first step."""
    plans = []
    real = PipelineSFTTrainer._choose

    def choose(self: PipelineSFTTrainer, config: ChunkConfig) -> PipelinePlan:
        plans.append(real(self, config))
        said.append(printed.getvalue())
        return plans[-1]

    said: list[str] = []
    PipelineSFTTrainer._choose = choose  # type: ignore[method-assign]
    try:
        with redirect_stdout(io.StringIO()) as printed:
            status, errors = launch(arguments)
    finally:
        PipelineSFTTrainer._choose = real  # type: ignore[method-assign]
    assert status == 0, errors
    return plans[0], said[0]


def launch_and_watch(arguments: list[str]) -> list[int]:
    """How many numbers the models have that are moved to a device."""
    moved = []
    real = nn.Module.to

    def to(self: nn.Module, *given: Any, **others: Any) -> Any:
        if isinstance(self, (PreTrainedModel, PeftModel, ModelStage)):
            moved.append(sum(p.numel() for p in self.parameters()))
        return real(self, *given, **others)

    nn.Module.to = to  # type: ignore[method-assign]
    try:
        status, said = launch(arguments)
    finally:
        nn.Module.to = real  # type: ignore[method-assign]
    assert status == 0, said
    return moved


def launch_and_fail(how: Failure, arguments: list[str]) -> tuple[str, float]:
    """The last stage fails in its second step, and its process ends. What the first one says, and the seconds
    that it took from the failure on."""
    steps = []
    real = Pipeline.step

    def step(self: Pipeline, *given: Any) -> Any:
        steps.append(time.monotonic())
        if len(steps) == 2 and self.stage.is_last:
            if how == "is killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "hangs":
                time.sleep(20)
                os._exit(1)
            self.stage.layers[-1].mlp.register_forward_pre_hook(_fail)  # type: ignore[union-attr, operator]
        return real(self, *given)

    launcher = load_script(ROOT / "launchers" / "train.py")
    os.environ.pop("ACCELERATE_USE_CPU", None)
    Pipeline.step = step  # type: ignore[method-assign]
    try:
        with redirect_stderr(io.StringIO()) as said:
            status = launcher.main(arguments)
    except ArithmeticError:
        os._exit(1)
    assert status == 1
    return said.getvalue(), time.monotonic() - steps[-1]


def _fail(*_: Any) -> None:
    raise ArithmeticError("planted")


def records(folder: Path) -> list[dict[str, Any]]:
    """What was logged."""
    return [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]


def log_history(folder: Path) -> list[dict[str, Any]]:
    (newest,) = sorted((folder / "out").glob("checkpoint-4"))
    history: list[dict[str, Any]] = json.loads((newest / "trainer_state.json").read_text())["log_history"]
    return history
