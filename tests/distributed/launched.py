"""The launcher inside ranks that stay: what `accelerate launch` and `deepspeed` start, without their cost.

The environment is the one that Accelerate itself makes of a preset.
"""

from __future__ import annotations

import gc
import io
import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any, Literal

import torch
from torch import distributed, nn
from torch.distributed.tensor import DTensor

from tests.helpers.tiny_run import ROOT, command_line, load_script

PRESETS = ROOT / "configs"
Death = Literal["in a step", "in a save"]


def arguments_of(
    engine: str, folder: Path, rows: list[dict[str, Any]], **options: Any
) -> tuple[str, list[str]]:
    """What `train` takes: a run of the model in `folder / "model"`, into `folder / "out"`."""
    options = {"long_samples": "split", "report_to": "none", "data_seed": 3, **options}
    arguments = command_line(folder / "model", rows, **options)
    at = arguments.index("--use_cpu")
    del arguments[at : at + 2]  # a preset must do without
    if engine.startswith("zero"):
        arguments += ["--deepspeed", str(PRESETS / "deepspeed" / f"{engine}.json")]
    return engine, arguments


def train(engine: str, arguments: list[str]) -> int:
    """One run on every rank. The exit status."""
    from accelerate.state import AcceleratorState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    launcher = load_launcher()
    seen: list[str] = []
    destroy, distributed.destroy_process_group = distributed.destroy_process_group, lambda: None
    try:
        with environment_of(engine), engines_seen(seen):
            status: int = launcher.main(arguments)
    finally:
        distributed.destroy_process_group = destroy
        unset_hf_deepspeed_config()
        AcceleratorState._reset_state(True)
        gc.collect()
    assert set(seen) <= {engine.split("-")[0]}, f"{engine} was asked for, {set(seen)} has trained"
    assert seen or status, "no step was taken"
    distributed.barrier()
    return status


@contextmanager
def engines_seen(seen: list[str]) -> Iterator[None]:
    """Collects by what the model was wrapped in each step."""
    from chunkdist.train.build import CheckedSFTTrainer

    real = CheckedSFTTrainer.training_step

    def training_step(self: Any, *given: Any, **values: Any) -> Any:
        seen.append(wrapping_engine(self))
        return real(self, *given, **values)

    CheckedSFTTrainer.training_step = training_step  # type: ignore[method-assign]
    try:
        yield
    finally:
        CheckedSFTTrainer.training_step = real  # type: ignore[method-assign]


def wrapping_engine(trainer: Any) -> str:
    """Named as its preset."""
    from deepspeed import DeepSpeedEngine
    from torch.distributed.fsdp import FSDPModule

    wrapped = trainer.model_wrapped
    if isinstance(wrapped, DeepSpeedEngine):
        return f"zero{wrapped.zero_optimization_stage()}"
    layers = [module for module in wrapped.modules() if type(module).__name__.endswith("DecoderLayer")]
    if isinstance(wrapped, FSDPModule) and all(isinstance(layer, FSDPModule) for layer in layers):
        whole = [name for name, p in wrapped.named_parameters() if not isinstance(p, DTensor)]
        assert layers
        assert not whole, f"not sharded: {whole}"
        return "fsdp2"
    return "ddp" if isinstance(wrapped, nn.parallel.DistributedDataParallel) else type(wrapped).__name__


def train_in_vain(engine: str, arguments: list[str]) -> tuple[int, str]:
    """As `train`; the exit status, and what was said on stderr."""
    with redirect_stderr(io.StringIO()) as said:
        return train(engine, arguments), said.getvalue()


def load_launcher() -> Any:
    return load_script(ROOT / "launchers" / "train.py")


@contextmanager
def environment_of(engine: str) -> Iterator[None]:
    """As `accelerate launch --config_file configs/accelerate/ENGINE.yaml` makes it."""
    before = dict(os.environ)
    preset = PRESETS / "accelerate" / f"{engine}.yaml"
    try:
        os.environ.pop("ACCELERATE_USE_CPU", None)
        if preset.exists():
            from accelerate.commands.launch import _validate_launch_command, launch_command_parser
            from accelerate.utils.launch import prepare_multi_gpu_env

            args = launch_command_parser().parse_args(["--config_file", str(preset), "script.py"])
            args, _, _ = _validate_launch_command(args)
            args.main_process_port = 0
            made = prepare_multi_gpu_env(args)
            os.environ.update({k: v for k, v in made.items() if k.startswith(("ACCELERATE_", "FSDP_"))})
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def train_and_die(death: Death, step: int, dying: tuple[int, ...], engine: str, arguments: list[str]) -> int:
    """As `train`, but some ranks are killed: in step `step`, or with its checkpoint half written."""
    from chunkdist.train.build import CheckedSFTTrainer
    from chunkdist.train.checkpoints.whole import UNFINISHED

    name = "training_step" if death == "in a step" else "_save_rng_state"
    real: Callable[..., Any] = getattr(CheckedSFTTrainer, name)

    def die(self: Any, *given: Any, **values: Any) -> Any:
        at = self.state.global_step + (death == "in a step")
        if at == step and distributed.get_rank() in dying:
            if death == "in a save":
                unfinished = Path(self.args.output_dir) / UNFINISHED
                assert any(path.stat().st_size > 1000 for path in unfinished.rglob("*"))
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, *given, **values)

    setattr(CheckedSFTTrainer, name, die)
    try:
        return train(engine, arguments)
    finally:
        setattr(CheckedSFTTrainer, name, real)


def train_and_be_told(step: int, told: tuple[int, ...], engine: str, arguments: list[str]) -> int:
    """As `train`, but some ranks are sent a SIGTERM in step `step`."""
    from chunkdist.train.build import CheckedSFTTrainer

    real = CheckedSFTTrainer.training_step

    def tell(self: Any, *given: Any, **values: Any) -> Any:
        if self.state.global_step + 1 == step and distributed.get_rank() in told:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *given, **values)

    CheckedSFTTrainer.training_step = tell  # type: ignore[method-assign]
    try:
        return train(engine, arguments)
    finally:
        CheckedSFTTrainer.training_step = real  # type: ignore[method-assign]


def master_dtypes(engine: str, arguments: list[str]) -> set[str]:
    """As `train`; the dtypes of what the optimizer updates, and of its states."""
    from chunkdist.train.build import CheckedSFTTrainer

    found: set[str] = set()
    real = CheckedSFTTrainer._save

    def look(self: Any, *given: Any, **values: Any) -> Any:
        optimizer = self.optimizer
        while not isinstance(optimizer, torch.optim.AdamW):
            optimizer = optimizer.optimizer
        updated = [x for parameter, state in optimizer.state.items() for x in (parameter, *state.values())]
        assert updated
        found.update(str(x.dtype) for x in updated if isinstance(x, torch.Tensor) and x.numel() > 1)
        return real(self, *given, **values)

    CheckedSFTTrainer._save = look  # type: ignore[method-assign]
    try:
        assert train(engine, arguments) == 0
    finally:
        CheckedSFTTrainer._save = real  # type: ignore[method-assign]
    return found


def figures(folder: Path, *names: str) -> dict[int, tuple[float, ...]]:
    """Logged values by step."""
    rows = [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: tuple(row[name] for name in names) for row in rows if "loss" in row}


def save_initial_model(model: Path, **config: Any) -> None:
    """Weights for the tiny model in a folder, so that every engine begins with the same ones."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model), **config)
    made.save_pretrained(model)
