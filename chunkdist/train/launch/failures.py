"""Which rank failed, and why: its word goes to the others through the job's store.

A rank that fails takes its connections with it, and all others fail then, too, at some collective and with a
message about sockets. What they say instead is what the first one said.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil  # type: ignore[import-untyped]
from torch import distributed

from chunkdist.train.launch.ranks import num_launched_ranks

_FIRST, _HEARD, _WAITED = "chunkdist/first_failure", "chunkdist/heard", "chunkdist/waited"
_LINGER_S = 5.0
"""How long the rank that holds the store waits for the others, and how long a dead process is looked for."""
_LOST = (
    "Connection closed by peer",
    "Connection reset",
    "Broken pipe",
    "Socket closed",
    "remote process exited",
)


_LATE = "Timed out waiting"


class RankFailure(RuntimeError):
    """Another rank failed first; the message names it and says why.

    Attributes:
        speaks: Whether this rank is to say it: one on each machine, but not one that is gone.
    """

    def __init__(self, message: str, *, speaks: bool = False) -> None:
        super().__init__(message)
        self.speaks = speaks


def speaks_here(error: object) -> bool:
    """Whether this process says what has gone wrong, so that a machine says it once. A process without peers
    always does, whatever rank a stale environment gives it."""
    is_first = os.environ.get("LOCAL_RANK") in (None, "", "0") or num_launched_ranks() == 1
    return is_first or bool(getattr(error, "speaks", False))


class FailureWatch:
    """Knows the ranks of a job, and tells them about the first failure.

    Made on every rank after the process group; `None` where there is one process only.
    """

    def __init__(self) -> None:
        self._store: Any = distributed.distributed_c10d._get_default_store()
        self._rank, self._num_ranks = distributed.get_rank(), distributed.get_world_size()
        self._host = socket.gethostname()
        self._store.set(f"chunkdist/process/{self._rank}", f"{os.getpid()} {self._host}")
        self._has_reported = False
        self.role_of: Callable[[int], str] = lambda rank: ""
        """What a rank does in the job, where ranks differ: ` (stage 1)`."""
        self._processes: dict[int, tuple[int, str]] = {}
        for rank in range(self._num_ranks):
            pid, host = self._store.get(f"chunkdist/process/{rank}").decode().split(" ", 1)
            self._processes[rank] = int(pid), host

    @staticmethod
    def start() -> FailureWatch | None:
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            return FailureWatch()
        return None

    def report(self, error: BaseException) -> RankFailure | None:
        """Tells the other ranks; returns what another one had told before, if that is something else."""
        self._has_reported = True
        own = f"rank {self._rank}{self.role_of(self._rank)} failed: {_one_line(error)}"
        if any(text in str(error) for text in _LOST):
            time.sleep(0.2)  # whoever fails with a word has told it before its connections close
            own = self._gone() or own
        try:
            if _LATE in str(error):
                own = self._missing() or own
            first = self._store.compare_set(_FIRST, "", own).decode()
            self._store.add(_HEARD, 1)
        except RuntimeError:  # the store died with the rank that held it
            first = own
        if first == own and own.startswith(f"rank {self._rank} "):
            print(f"chunkdist: {own}", file=sys.stderr, flush=True)
            return None
        if first.partition(" failed: ")[2] == _one_line(error):
            return None  # all ranks have found the same fault
        return RankFailure(first, speaks=self._is_first_here())

    def _is_first_here(self) -> bool:
        """Whether all lower ranks of this machine are gone."""
        lower = [
            pid for rank, (pid, host) in self._processes.items() if rank < self._rank and host == self._host
        ]
        return not any(map(_is_running, lower))

    def leave(self) -> None:
        """The rank that holds the store leaves last. Called when the process group has been destroyed."""
        if (
            not self._has_reported
            or self._rank != 0
            or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        ):
            return
        deadline = time.monotonic() + _LINGER_S
        while self._store.add(_HEARD, 0) < self._num_ranks and time.monotonic() < deadline:
            time.sleep(0.05)

    def _gone(self) -> str | None:
        """Names a rank of this machine whose process has ended without a word."""
        deadline = time.monotonic() + _LINGER_S
        while time.monotonic() < deadline:
            for rank, (pid, host) in self._processes.items():
                if host == self._host and not _is_running(pid):
                    return (
                        f"rank {rank}{self.role_of(rank)} is gone (process {pid} was killed, or has crashed)"
                    )
            if len({host for _, host in self._processes.values()}) > 1:
                return None
            time.sleep(0.1)
        return None

    def _missing(self) -> str | None:
        """Names the ranks that do not wait for others: all that wait time out at about the same time."""
        self._store.set(f"{_WAITED}/{self._rank}", "")
        time.sleep(_LINGER_S)
        ranks = [rank for rank in range(self._num_ranks) if not self._store.check([f"{_WAITED}/{rank}"])]
        if not ranks:
            return None
        names = ", ".join(f"{rank}{self.role_of(rank)}" for rank in ranks)
        return f"rank {names} did not come to a collective within the timeout (ddp_timeout)"


@contextmanager
def named_failures(watch: FailureWatch | None) -> Iterator[None]:
    """An error in the block becomes a `RankFailure` where another rank failed first.

    Raises:
        RankFailure: names that rank and its reason.
    """
    try:
        yield
    except Exception as error:
        failure = watch.report(error) if watch else None
        if failure is None:
            raise
        raise failure from None


def _is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
