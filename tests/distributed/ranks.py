"""Gloo ranks for tests: processes that stay, take one function after another, and are killed when one hangs.

Ranks are forked from one server, which has imported everything and started nothing. A case that fails or does
not end takes its pool with it; the next case starts a new one.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

TIMEOUT_S = 120
_FORKED = multiprocessing.get_context("forkserver")
_FORKED.set_forkserver_preload(["tests.distributed.preload"])


class RankError(AssertionError):
    """A rank failed, died, or did not end; the message names it and shows its traceback."""


class Ranks:
    """Some ranks of one process group.

    Args:
        num_ranks: How many.
        timeout_s: For one case; each rank then writes its stack to stderr and is killed.
        may_die: Ranks whose death is no failure; their result is then `None`.
    """

    def __init__(self, num_ranks: int, timeout_s: float = TIMEOUT_S, may_die: tuple[int, ...] = ()) -> None:
        self.num_ranks = num_ranks
        self.may_die = may_die
        self.timeout_s = timeout_s
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """`function(*args)` on every rank; the results by rank. Functions are importable, results picklable.

        Raises:
            RankError: one failed; the others have been stopped.
        """
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, args))
        results: dict[int, Any] = {}
        deadline = time.monotonic() + self.timeout_s
        while len(results) < self.num_ranks:
            waiting = {pipe: rank for rank, pipe in enumerate(self._pipes) if rank not in results}
            ready = wait(list(waiting), timeout=max(0, deadline - time.monotonic()))
            if not ready:
                for process in self._processes:
                    os.kill(process.pid, signal.SIGUSR1)  # faulthandler writes the stack
                time.sleep(1)
                self.stop()
                raise RankError(f"ranks {sorted(waiting.values())} did not end within {self.timeout_s} s")
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = waiting[pipe]
                try:
                    ok, result = pipe.recv()
                except EOFError:
                    self._processes[rank].join(5)
                    ok, result = rank in self.may_die, None
                if not ok and result is None:
                    result = f"died with exit code {self._processes[rank].exitcode}"
                if not ok:
                    self.stop()
                    raise RankError(f"rank {rank} failed:\n{result}")
                results[rank] = result
        return [results[rank] for rank in range(self.num_ranks)]

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        port = free_port()
        for rank in range(self.num_ranks):
            ours, theirs = _FORKED.Pipe()
            process = _FORKED.Process(target=_serve, args=(theirs, rank, self.num_ranks, port), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _serve(pipe: Connection, rank: int, num_ranks: int, port: int) -> None:
    faulthandler.enable()  # a rank that a signal kills writes the stacks of all its threads to stderr
    faulthandler.register(signal.SIGUSR1, all_threads=False)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_ranks), LOCAL_WORLD_SIZE=str(num_ranks),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1",
        ACCELERATE_USE_CPU="true", CUDA_VISIBLE_DEVICES="",
    )  # fmt: skip
    import torch

    from chunkdist.train.launch.gloo import use_one_gloo_thread, wake_without_preempting

    use_one_gloo_thread()
    wake_without_preempting()
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=num_ranks)
    while True:
        try:
            function, args = pipe.recv()
            message = True, function(*args)
        except EOFError:
            return
        except BaseException:
            message = False, traceback.format_exc()
        sys.stdout.flush()
        pipe.send(message)
