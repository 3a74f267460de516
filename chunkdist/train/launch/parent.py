"""The launchers above this process: whether they are still there.

`accelerate launch` with one process and `deepspeed` die of a SIGTERM without a word to those that they have
started, and no launcher can say anything when it is killed. Their ranks would train on, with nobody to stop
them. What was started by a shell, by `nohup`, `timeout` or a notebook has no launcher above it, and is never
said to have lost one, whatever stale variables its environment has.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil  # type: ignore[import-untyped]

_SCRIPTS = {"torchrun", "accelerate", "accelerate-launch", "deepspeed", "ds", "deepspeed.pt"}
_MODULES = {
    "torch.distributed.run",
    "torch.distributed.launch",
    "accelerate.commands.launch",
    "accelerate.commands.accelerate_cli",
    "deepspeed.launcher.launch",
    "deepspeed.launcher.runner",
}
_TORCHRUN = "TORCHELASTIC_RUN_ID"
_LAUNCHED = (
    (_TORCHRUN,),
    ("CROSS_RANK", "CROSS_SIZE", "LOCAL_SIZE"),
    ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_CPU", "ACCELERATE_DYNAMO_MODE"),
)
"""What torchrun (2.13), deepspeed (0.19) and `accelerate launch` (1.15) each set for all that they start."""


class Launchers:
    """Those above this process, found when the object is made: the parent, and the launcher's own launcher
    (`deepspeed` starts ranks through a second process, which survives it)."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self._parent = os.getppid()
        self._found: list[psutil.Process] = []
        self._was_orphaned = False
        if not any(all(name in environment for name in names) for names in _LAUNCHED):
            return
        with suppress(psutil.Error):
            ancestors = psutil.Process().parents()
            while ancestors and is_launcher(_arguments(ancestors[0])):
                self._found.append(ancestors.pop(0))
            runs_below_another = bool(self._found) and is_inner(_arguments(self._found[-1]))
            if (
                not self._found
                and _TORCHRUN in environment
                and _is_python(_arguments(psutil.Process(self._parent)))
            ):
                # A program of the user's that starts ranks by torch's functions.
                self._found.append(psutil.Process(self._parent))
            elif not self._found or runs_below_another:
                # The launcher has died while this process was importing.
                above = self._found[-1].ppid() if self._found else self._parent
                self._was_orphaned = above == 1 and not _is_python(_arguments(psutil.Process(1)))

    @property
    def are_watched(self) -> bool:
        return bool(self._found) or self._was_orphaned

    def are_gone(self) -> bool:
        """Whether one of them has ended."""
        if self._was_orphaned:
            return True
        if not self._found:
            return False
        return os.getppid() != self._parent or not all(map(_runs, self._found))


def is_launcher(arguments: Sequence[str]) -> bool:
    """Whether a process's command line is that of a launcher of ranks."""
    words = list(arguments[1:] if _is_python(arguments) else arguments)
    for at, word in enumerate(words):
        if word == "-m":
            return words[at + 1 : at + 2] != [] and words[at + 1] in _MODULES
        if not word.startswith("-"):
            module = word.removesuffix(".py").replace(os.sep, ".")
            return Path(word).name in _SCRIPTS or any(module.endswith(f".{name}") for name in _MODULES)
    return False


def is_inner(arguments: Sequence[str]) -> bool:
    """Whether a launcher is the one that `deepspeed` starts on each machine."""
    return "deepspeed.launcher.launch" in arguments


def _arguments(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


def _is_python(arguments: Sequence[str]) -> bool:
    return bool(arguments) and Path(arguments[0]).name.lower().startswith(("python", "pypy"))


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running()) and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
