"""Runs of launchers that are told to stop in the middle: how they are started, told, and seen to end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

import psutil  # type: ignore[import-untyped]

from tests.distributed.ranks import free_port
from tests.helpers.tiny_run import ROOT

BIN = Path(sys.executable).parent
LAUNCHER = ROOT / "launchers" / "train.py"
START_S, END_S = 400.0, 10.0
Launcher = Literal["python", "accelerate", "deepspeed", "torchrun"]
Target = Literal["launcher", "group", "rank"]

# Steps take half a second, so that one can be met in its middle; in the third, a file says so.
SLOW = f"""
import os, runpy, time
from pathlib import Path
from chunkdist.train.build import CheckedSFTTrainer

real = CheckedSFTTrainer.training_step

def training_step(self, *args, **kwargs):
    if self.state.global_step == 2:
        Path(os.environ["READY"], os.environ.get("RANK", "0")).write_text(str(os.getpid()))
    time.sleep(0.5)
    return real(self, *args, **kwargs)

CheckedSFTTrainer.training_step = training_step
runpy.run_path({str(LAUNCHER)!r}, run_name="__main__")
"""


class Run:
    """A launcher in a group of processes of its own, waited for until its third step runs.

    Args:
        launcher: With `accelerate` the options of its own come first in `arguments`, up to `--`.
        folder: For the script and for what processes tell.
    """

    def __init__(self, launcher: Launcher, folder: Path, arguments: list[str], num_ranks: int = 1) -> None:
        ready = folder / "ready"
        ready.mkdir()
        script = folder / "slow.py"
        script.write_text(SLOW)
        own = arguments[: arguments.index("--")] if "--" in arguments else []
        command = [*_command(launcher, num_ranks, own), str(script), *arguments[len(own) + bool(own) :]]
        self._log = folder / "log.txt"
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=_environment(ready),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_S
        try:
            while len(list(ready.iterdir())) < num_ranks:
                assert self.process.poll() is None, self.said()
                assert time.monotonic() < deadline, self.said()
                time.sleep(0.05)
        except BaseException:
            self.kill()
            raise
        time.sleep(0.1)  # the files have their text
        self.ranks = {int(path.name): int(path.read_text()) for path in ready.iterdir()}
        self._all = [self.process.pid, *(child.pid for child in self._tree())]

    def said(self) -> str:
        return self._log.read_text()

    def tell(self, target: Target, number: signal.Signals = signal.SIGTERM) -> None:
        if target == "group":
            os.killpg(self.process.pid, number)
        else:
            os.kill(self.process.pid if target == "launcher" else self.ranks[max(self.ranks)], number)

    def left(self, within_s: float = END_S) -> list[str]:
        """Which processes have not ended by then."""
        deadline = time.monotonic() + within_s
        while (left := [pid for pid in self._all if self._runs(pid)]) and time.monotonic() < deadline:
            time.sleep(0.1)
        return [" ".join(psutil.Process(pid).cmdline()[:6]) for pid in left if psutil.pid_exists(pid)]

    def kill(self) -> None:
        """Whatever there is left of it."""
        for pid in [*getattr(self, "_all", []), *(child.pid for child in self._tree()), self.process.pid]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()

    def _tree(self) -> list[psutil.Process]:
        try:
            return list(psutil.Process(self.process.pid).children(recursive=True))
        except psutil.NoSuchProcess:
            return []

    def _runs(self, pid: int) -> bool:
        if pid == self.process.pid:
            return self.process.poll() is None
        try:
            return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


def _command(launcher: Launcher, num_ranks: int, own: list[str]) -> list[str]:
    if launcher == "python":
        return [sys.executable]
    if launcher == "accelerate":
        return [str(BIN / "accelerate"), "launch", "--main_process_port", str(free_port()), *own]
    if launcher == "deepspeed":
        return [str(BIN / "deepspeed"), "--num_gpus", str(num_ranks), "--master_port", str(free_port())]
    return [
        *(str(BIN / "torchrun"), "--nnodes", "1", "--nproc-per-node", str(num_ranks)),
        *("--master-addr", "127.0.0.1", "--master-port", str(free_port())),
    ]


def _environment(ready: Path) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    search = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": path, "PATH": search, "READY": str(ready)}
