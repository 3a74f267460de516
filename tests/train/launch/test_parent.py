"""Which processes above this one are launchers, and whether one that was there is gone."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from chunkdist.train.launch.parent import is_launcher
from tests.helpers.tiny_run import ROOT

LAUNCHERS = [
    ["/v/bin/python", "/v/bin/torchrun", "--nproc-per-node", "2", "train.py"],
    ["python3.11", "-u", "-m", "torch.distributed.run", "train.py"],
    ["/v/bin/python", "/v/bin/accelerate", "launch", "train.py"],
    ["/usr/bin/python3", "-u", "-m", "deepspeed.launcher.launch", "--world_info=abc", "train.py"],
    ["/v/bin/python", "/v/bin/deepspeed", "--num_gpus", "2", "train.py"],
    ["python", "/v/lib/torch/distributed/run.py", "train.py"],
]
OTHERS = [
    ["-bash"],
    ["bash", "-c", "accelerate launch train.py"],
    ["nohup", "accelerate", "launch"],
    ["timeout", "60", "deepspeed", "train.py"],
    ["/v/bin/python", "train.py", "--deepspeed", "zero2.json"],
    ["python", "-m", "ipykernel_launcher", "-f", "kernel.json"],
    ["python", "-m"],
    ["slurmstepd: [1.0]"],
    [],
]


@pytest.mark.parametrize("arguments", LAUNCHERS, ids=lambda words: " ".join(words[1:3]))
def test_a_launcher_is_known_by_its_command(arguments: list[str]) -> None:
    assert is_launcher(arguments)


@pytest.mark.parametrize("arguments", OTHERS, ids=lambda words: " ".join(words[:2]))
def test_anything_else_is_none(arguments: list[str]) -> None:
    assert not is_launcher(arguments)


CHILD = """
import sys, time
sys.path.insert(0, {root!r})
from chunkdist.train.launch.parent import Launchers
print("begun", flush=True)
time.sleep({late})
launchers = Launchers({environment!r})
print(launchers.are_watched, launchers.are_gone(), flush=True)
time.sleep({wait})
print(launchers.are_watched, launchers.are_gone(), flush=True)
"""


def tells(folder: Path, parent: str, environment: dict[str, str], late: float = 0.0) -> list[str]:
    """What a child says of its launchers while the parent, a script of this name, lives, and after its end;
    if it looks `late`, both are after its end."""
    package = (
        folder / "chunkdist" / "train" / "launch"
    )  # without the package's own imports, which take seconds
    package.mkdir(parents=True)
    for path in (package, package.parent, package.parents[1]):
        (path / "__init__.py").touch()
    (package / "parent.py").write_text((ROOT / "chunkdist" / "train" / "launch" / "parent.py").read_text())
    script, child, output = folder / parent, folder / "child.py", folder / "said"
    child.write_text(CHILD.format(root=str(folder), environment=environment, wait=2.0, late=late))
    script.write_text(
        "import subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, {str(child)!r}], stdout=open({str(output)!r}, 'w'))\n"
        "time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, str(script)])
    try:
        said(output, 1 if late else 2)
    finally:
        process.kill()
        process.wait()
    return said(output, 3)[1:]


def said(output: Path, num_lines: int) -> list[str]:
    deadline = time.monotonic() + 60
    while len(lines := output.read_text().splitlines() if output.exists() else []) < num_lines:
        assert time.monotonic() < deadline, lines
        time.sleep(0.05)
    return lines


TORCHRUN = {"TORCHELASTIC_RUN_ID": "none"}
ACCELERATE = {
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_USE_CPU": "true",
    "ACCELERATE_DYNAMO_MODE": "default",
}


def test_a_launcher_that_is_killed_is_missed(tmp_path: Path) -> None:
    assert tells(tmp_path, "accelerate", ACCELERATE) == ["True False", "True True"]


def test_a_program_that_launches_by_itself_is_missed(tmp_path: Path) -> None:
    assert tells(tmp_path, "mine.py", TORCHRUN) == ["True False", "True True"]


def test_a_launcher_that_died_while_its_rank_was_importing_is_missed(tmp_path: Path) -> None:
    assert tells(tmp_path, "accelerate", ACCELERATE, late=3.0) == ["True True", "True True"]


@pytest.mark.parametrize(
    ("parent", "environment"),
    [("accelerate", {}), ("shell.py", ACCELERATE), ("shell.py", {"LOCAL_RANK": "0", "WORLD_SIZE": "1"})],
)
def test_what_no_launcher_has_started_misses_nobody(
    tmp_path: Path, parent: str, environment: dict[str, str]
) -> None:
    """Neither with stale variables of an earlier launch."""
    assert tells(tmp_path, parent, environment) == ["False False", "False False"]
