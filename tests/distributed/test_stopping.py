"""A run of several ranks that is told to stop: all save one step, end, and go on to the bit.

In ranks that stay, one rank is told; the launchers themselves are told in processes of their own.
"""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from chunkdist.train.checkpoints.files import fault_of
from chunkdist.train.launch.stopping import STOPPED
from tests.distributed.launched import arguments_of, save_initial_model, train, train_and_be_told
from tests.distributed.ranks import Ranks
from tests.distributed.stopped import Launcher, Run, Target
from tests.helpers.tiny_run import ROOT, TEXTS, make_model_folder

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")

ROWS = TEXTS * 3
OPTIONS: dict[str, Any] = {"max_steps": 6, "lr_scheduler_type": "linear", "seed": 5}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_model_folder(tmp_path_factory.mktemp("stop") / "model")
    save_initial_model(folder)
    return folder


@pytest.fixture
def folder(model: Path, tmp_path: Path) -> Path:
    shutil.copytree(model, tmp_path / "model")
    return tmp_path


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    ranks = Ranks(2, timeout_s=400)  # of which most is imports, on a busy machine
    yield ranks
    ranks.stop()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder / "out").state_dict())


def assert_resumes_to_the_bit(ranks: Ranks, engine: str, folder: Path) -> None:
    """From the one checkpoint in `out`, to the weights of a run that was not stopped."""
    resumed = arguments_of(engine, folder, ROWS, **OPTIONS, resume_from_checkpoint=True)
    assert ranks.run(train, *resumed) == [0] * ranks.num_ranks
    found = weights(folder)
    shutil.rmtree(folder / "out")
    assert ranks.run(train, *arguments_of(engine, folder, ROWS, **OPTIONS)) == [0] * ranks.num_ranks
    for name, value in weights(folder).items():
        assert torch.equal(value, found[name]), name


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero2"])
def test_one_rank_that_is_told_stops_all_at_one_step(two_ranks: Ranks, folder: Path, engine: str) -> None:
    """Rank 1, while rank 0 may be elsewhere in the step."""
    arguments = arguments_of(engine, folder, ROWS, **OPTIONS)
    assert two_ranks.run(train_and_be_told, 3, (1,), *arguments) == [STOPPED, STOPPED]
    assert [path.name for path in (folder / "out").glob("checkpoint-*")] == ["checkpoint-3"]
    assert fault_of(folder / "out" / "checkpoint-3") is None
    assert_resumes_to_the_bit(two_ranks, engine, folder)


LAUNCHES: list[tuple[Launcher, str, int, Target, signal.Signals]] = [
    ("python", "ddp", 1, "group", signal.SIGINT),
    ("accelerate", "ddp", 1, "launcher", signal.SIGTERM),
    ("deepspeed", "zero2", 2, "launcher", signal.SIGTERM),
    ("torchrun", "ddp", 2, "launcher", signal.SIGTERM),
    ("torchrun", "zero2", 2, "rank", signal.SIGTERM),
    ("torchrun", "ddp", 2, "launcher", signal.SIGKILL),
    ("accelerate", "fsdp2", 2, "group", signal.SIGTERM),
]


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "engine", "num_ranks", "target", "number"), LAUNCHES)
def test_a_launch_saves_and_leaves_no_process(
    folder: Path,
    launcher: Launcher,
    engine: str,
    num_ranks: int,
    target: Target,
    number: signal.Signals,
) -> None:
    """Told to the launcher alone, to the whole group of processes, to one rank; and a launcher that is
    killed."""
    _, arguments = arguments_of(engine, folder, ROWS, **{**OPTIONS, "max_steps": 200})
    run = Run(launcher, folder, [*own_options(launcher, engine), *arguments], num_ranks)
    try:
        run.tell(target, number)
        left = run.left()
        said = run.said()
    finally:
        run.kill()
    assert not left, said
    (checkpoint,) = (folder / "out").glob("checkpoint-*")
    assert int(checkpoint.name.split("-")[1]) in range(3, 8), "within the step that ran, on a slow machine"
    assert fault_of(checkpoint) is None
    assert said.count(f"{checkpoint.name} saved: run the same command") == 1
    assert "Traceback" not in said.partition("saved: run the same command")[0]
    assert not list((folder / "out").glob(".unfinished*"))
    if launcher == "python":
        assert run.process.returncode == STOPPED


def own_options(launcher: Launcher, engine: str) -> list[str]:
    if launcher == "python":
        return ["--use_cpu", "True"]
    if launcher != "accelerate":
        return []
    if engine == "fsdp2":
        return ["--config_file", str(ROOT / "configs" / "accelerate" / "fsdp2.yaml"), "--"]
    one = ["--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no"]
    return [*one, "--dynamo_backend", "no", "--cpu", "--"]
