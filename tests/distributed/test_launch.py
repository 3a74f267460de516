"""The presets as they are, on two gloo ranks: they train, agree, and leave a model that loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.distributed.ranks import free_port
from tests.tiny_run import ROOT, TEXTS, command_line, make_model_folder

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU"),
]

BIN = Path(sys.executable).parent
ACCELERATE, DEEPSPEED = ROOT / "configs" / "accelerate", ROOT / "configs" / "deepspeed"
LAUNCHER = str(ROOT / "launchers" / "train.py")
TIMEOUT_S = 400


def launch(engine: str, options: list[str]) -> subprocess.CompletedProcess[str]:
    port = str(free_port())
    if engine.startswith("zero"):
        command = [str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", port, LAUNCHER, *options]
        command += ["--deepspeed", str(DEEPSPEED / f"{engine}.json")]
    elif engine == "one process":
        command = [sys.executable, LAUNCHER, *options]
    elif engine == "torchrun":
        command = [str(BIN / "torchrun"), "--nproc-per-node", "2", "--master-port", port, LAUNCHER, *options]
    else:
        preset = str(ACCELERATE / f"{engine}.yaml")
        command = [str(BIN / "accelerate"), "launch", "--config_file", preset, "--main_process_port", port]
        command += [LAUNCHER, *options]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        command,
        cwd=ROOT,
        env={
            **os.environ,
            "DS_ACCELERATOR": "cpu",
            "PYTHONPATH": path,
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        },
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def run(engine: str, folder: Path, **values: object) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses by step, and the weights of the saved model."""
    folder.mkdir()
    model = make_model_folder(folder / "model")
    options = command_line(model, TEXTS * 4, max_steps=3, long_samples="split", report_to="none", **values)
    at = options.index("--use_cpu")
    del options[at : at + 2]  # the preset must do without
    done = launch(engine, options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
    weights = dict(AutoModelForCausalLM.from_pretrained(folder / "out").state_dict())
    assert not list((folder / "out").glob(".unfinished*"))
    return [row["loss"] for row in rows if "loss" in row], weights


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], dict[str, torch.Tensor]]:
    """One process, without chunks, whose batch holds what two ranks get: with other numbers of supervised
    tokens, so that only a loss divided by those of all ranks is the same."""
    folder = tmp_path_factory.mktemp("launch") / "one"
    return run("one process", folder, chunk_method="none", per_device_train_batch_size=2)


@pytest.mark.parametrize("engine", ["ddp", "torchrun", "fsdp2", "fsdp2-offload", "zero1"])
def test_a_preset_trains_as_one_process_does(
    engine: str, tmp_path: Path, expected: tuple[list[float], dict[str, torch.Tensor]]
) -> None:
    losses, weights = run(engine, tmp_path / "run")
    assert len(losses) == 3
    assert losses == pytest.approx(expected[0], rel=1e-4)
    for name, value in expected[1].items():
        torch.testing.assert_close(weights[name].float(), value.float(), rtol=0, atol=5e-4)
