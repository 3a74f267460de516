"""The launchers themselves, on a machine with no GPU: processes of their own, 2 gloo ranks.

What they run is tested in test_presets.py, within ranks that stay.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.distributed.launched import figures
from tests.distributed.ranks import free_port
from tests.helpers.tiny_run import ROOT, TEXTS, command_line, make_model_folder

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU"),
]

BIN = Path(sys.executable).parent
ACCELERATE, DEEPSPEED = ROOT / "configs" / "accelerate", ROOT / "configs" / "deepspeed"
LAUNCHER = str(ROOT / "launchers" / "train.py")
TIMEOUT_S = 400


def start(command: list[str]) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    search = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": path, "PATH": search},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def options_for(folder: Path, **values: object) -> list[str]:
    model = make_model_folder(folder / "model")
    given = {"max_steps": 2, "long_samples": "split", "report_to": "none", **values}
    options = command_line(model, TEXTS * 4, **given)
    at = options.index("--use_cpu")
    return [*options[:at], *options[at + 2 :]]  # the preset must do without


def ended(processes: list[subprocess.Popen[str]]) -> list[str]:
    """What each wrote; all are stopped when one does not end."""
    try:
        return [process.communicate(timeout=TIMEOUT_S)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()


def assert_trained(folder: Path) -> None:
    assert list(figures(folder, "loss")) == [1, 2]
    AutoModelForCausalLM.from_pretrained(folder / "out")
    assert not list((folder / "out").glob(".unfinished*"))


@pytest.mark.parametrize("launcher", ["accelerate", "deepspeed"])
def test_a_launcher_trains(launcher: str, tmp_path: Path) -> None:
    port, options = str(free_port()), options_for(tmp_path, save_strategy="steps", save_steps=2)
    if launcher == "deepspeed":
        command = [str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", port, LAUNCHER, *options]
        command += ["--deepspeed", str(DEEPSPEED / "zero3.json")]
    else:
        preset = str(ACCELERATE / "fsdp2.yaml")
        command = [str(BIN / "accelerate"), "launch", "--config_file", preset, "--main_process_port", port]
        command += [LAUNCHER, *options]
    process = start(command)
    (said,) = ended([process])
    assert process.returncode == 0, said[-5000:]
    assert_trained(tmp_path)
    of_engine = {
        "accelerate": "pytorch_model_fsdp_0/__1_0.distcp",
        "deepspeed": "global_step2/*rank_1*states.pt",
    }
    assert list((tmp_path / "out" / "checkpoint-2").glob(of_engine[launcher])), (
        "rank 1 has saved no part of it"
    )


def nodes(options: list[str], script: str = LAUNCHER) -> list[subprocess.Popen[str]]:
    """Two agents of torchrun, as on two machines, each with one rank."""
    torchrun = [str(BIN / "torchrun"), "--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1"]
    torchrun += ["--master-port", str(free_port())]
    return [start([*torchrun, "--node-rank", str(node), script, *options]) for node in range(2)]


def test_two_nodes_train(tmp_path: Path) -> None:
    processes = nodes(options_for(tmp_path))
    said = ended(processes)
    assert [process.returncode for process in processes] == [0, 0], said
    assert_trained(tmp_path)


FAILING = f"""
import os, runpy
from torch import distributed
from chunkdist.train.build import CheckedSFTTrainer

real = CheckedSFTTrainer.training_step

def training_step(self, *args, **kwargs):
    if os.environ["RANK"] == "1" and self.state.global_step == 1:
        group = distributed.distributed_c10d._get_default_group()
        timeout = group._get_backend(self.args.device).options._timeout
        raise RuntimeError(f"the disk of this rank is gone, long before {{timeout}}")
    return real(self, *args, **kwargs)

CheckedSFTTrainer.training_step = training_step
runpy.run_path({LAUNCHER!r}, run_name="__main__")
"""


REASON = "chunkdist: rank 1 failed: RuntimeError: the disk of this rank is gone, long before 0:15:00"


@pytest.mark.parametrize("values", [{}, {"sequence_parallel_size": 2}], ids=str)
def test_a_rank_that_fails_stops_the_others_and_is_named(tmp_path: Path, values: dict[str, int]) -> None:
    """Before a step, when the others wait for its gradients, or, of a shared row, for its tokens."""
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    processes = nodes(options_for(tmp_path, ddp_timeout=900, **values), str(script))
    said = ended(processes)
    assert all(process.returncode for process in processes)
    for output in said:
        assert REASON in output, output[-5000:]
    assert "Connection closed" not in said[0].replace("\n", " ").split("chunkdist: rank 1 failed")[0]
