"""Whether the ranks that the environment tells of can meet, before anything waits for them.

torch waits for ranks that never come, and for a machine that cannot be reached, for half an hour, and does
not say for whom. Ranks of torchrun have met already, in its agent's store.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable, Mapping, MutableMapping
from datetime import timedelta

from torch import distributed
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # not in its __all__ (2.13)

ONE_MACHINE_S = 300.0
"""How long ranks of one machine are waited for; those of several, `ddp_timeout` (30 minutes unless set)."""
_NOTICE_S = 30.0
_STEP_S = 0.5
_NUMBERS = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
_FALSE = frozenset({"false", "no", "off", "0", "n", "f"})
_TRUE = frozenset({"true", "yes", "on", "1", "y", "t"})
# What Accelerate (1.15) reads them as; of these two, places of its code take other words than true for false.
_FLAGS = {
    "ACCELERATE_USE_FSDP": _FALSE | {"true"},
    "ACCELERATE_USE_DEEPSPEED": _FALSE | {"true"},
    "ACCELERATE_USE_CPU": _FALSE | _TRUE,
    "ACCELERATE_DEBUG_MODE": _FALSE | _TRUE,
}
_UNSET = (
    "start it with torchrun, accelerate launch or deepspeed, or unset WORLD_SIZE and RANK for one process"
)


class LaunchError(ValueError):
    """The launcher's variables do not fit each other, or the ranks cannot meet. Every rank says so: which
    others there are is what is not known."""

    speaks = True


def check_launch(environment: Mapping[str, str] = os.environ) -> None:
    """Looks at the launcher's variables alone.

    Raises:
        LaunchError: one is no number or out of range, or one is missing.
    """
    numbers = {name: _number(name, environment[name]) for name in _NUMBERS if environment.get(name)}
    size, rank = numbers.get("WORLD_SIZE", 1), numbers.get("RANK", 0)
    if size < 1:
        raise LaunchError(f"WORLD_SIZE={size}: there is at least one process; {_UNSET}")
    if not 0 <= rank < size:
        raise LaunchError(
            f"RANK={rank} is out of range for WORLD_SIZE={size}: ranks go from 0 to {size - 1}; {_UNSET}"
        )
    local_rank, local_size = numbers.get("LOCAL_RANK", 0), numbers.get("LOCAL_WORLD_SIZE")
    if local_rank < 0 or (local_size is not None and local_rank >= local_size):
        raise LaunchError(
            f"LOCAL_RANK={local_rank} is out of range for LOCAL_WORLD_SIZE={local_size}: it is the number of "
            "a process on its machine, from 0 on"
        )
    if not 0 <= numbers.get("MASTER_PORT", 0) < 2**16:
        raise LaunchError(f"MASTER_PORT={numbers['MASTER_PORT']} is no port: write one from 1 to 65535")
    needed = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if size > 1 and not environment.get(name)]
    if missing:
        raise LaunchError(f"WORLD_SIZE={size} without {' and '.join(missing)}: {_UNSET}")
    for name, words in _FLAGS.items():
        if (value := environment.get(name, "false")).lower() not in words:
            raise LaunchError(f"{name}={value!r}: write true or false, or unset it")


def forget_stale_rank(environment: MutableMapping[str, str] = os.environ) -> None:
    """Drops a LOCAL_RANK that an earlier launch has left in the shell. Accelerate (1.15) would look for the
    other ranks by it."""
    alone = environment.get("WORLD_SIZE") in (None, "", "1") and not environment.get("MASTER_ADDR")
    if alone and "LOCAL_RANK" in environment:
        rank = environment.pop("LOCAL_RANK")
        print(f"LOCAL_RANK={rank} is ignored: there is no MASTER_ADDR, so this is one process", flush=True)


def meet(timeout: timedelta, environment: Mapping[str, str] = os.environ) -> TCPStore | None:
    """Waits until all ranks are there. Returns the store where they met: the process group that torch then
    makes uses the same one, so it is to be kept until then. `None` where there is nobody to meet, or all
    have met.

    Raises:
        LaunchError: rank 0's port is taken or cannot be reached, or ranks are missing.
    """
    size = int(environment.get("WORLD_SIZE") or "1")
    if size == 1 or distributed.is_initialized() or environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return None
    rank = int(environment["RANK"])
    host, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    wait_s = timeout.total_seconds()
    if _is_one_machine(host, environment):
        wait_s = min(wait_s, ONE_MACHINE_S)
    deadline = time.monotonic() + wait_s
    try:
        socket.getaddrinfo(host, port)
    except OSError as error:
        raise LaunchError(
            f"MASTER_ADDR={host!r} is the name of no machine that this one knows ({error.strerror}): write "
            "the address of rank 0's machine"
        ) from error
    if rank == 0:
        store = _host_store(host, port, deadline)
    else:
        speaks = environment.get("LOCAL_RANK") == "0"
        store = _reach_store(host, port, wait_s, deadline, speaks=speaks)
    store.set(f"chunkdist/present/{rank}", "")
    if rank == 0:
        if not _await(
            lambda: _absent(store, size) == [], deadline, lambda: _missing(_absent(store, size), size)
        ):
            raise LaunchError(_gave_up(_missing(_absent(store, size), size), wait_s))
        store.set("chunkdist/all_present", "")
        return store
    try:
        if not _await(lambda: bool(store.check(["chunkdist/all_present"])), deadline + 5):
            raise LaunchError(_gave_up(_missing(_absent(store, size), size), wait_s))
    except RuntimeError as error:  # the store has ended with rank 0
        raise LaunchError(
            f"rank 0 has given up while it waited for the ranks of WORLD_SIZE={size}"
        ) from error
    return store


def _number(name: str, value: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise LaunchError(f"{name}={value!r} is no whole number: {_UNSET}") from None


def _host_store(host: str, port: int, deadline: float) -> TCPStore:
    try:
        return _open(host, port, is_master=True, deadline=deadline)
    except (RuntimeError, ValueError) as error:
        if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
            raise LaunchError(
                f"MASTER_PORT={port} is in use on this machine, by another job or program: write another one "
                "(--master_port of deepspeed and torchrun, --main_process_port of accelerate)"
            ) from error
        raise LaunchError(
            f"rank 0 cannot be reached at its own MASTER_ADDR={host}, MASTER_PORT={port} "
            f"({_first_line(error)}): write the address of rank 0's machine"
        ) from error


def _reach_store(host: str, port: int, wait_s: float, deadline: float, *, speaks: bool) -> TCPStore:
    faults: list[str] = []

    def is_reached() -> bool:
        try:
            socket.create_connection((host, port), timeout=5).close()
        except OSError as error:
            faults.append(error.strerror or str(error))
            return False
        return True

    def fault() -> str:
        return f"rank 0 is not at {host}:{port} ({faults[-1] if faults else 'no answer'})"

    if not _await(is_reached, deadline, fault if speaks else None):
        raise LaunchError(
            _gave_up(
                f"{fault()}: see that it was started, and that MASTER_ADDR and MASTER_PORT are its", wait_s
            )
        )
    try:
        return _open(host, port, is_master=False, deadline=deadline)
    except RuntimeError as error:
        raise LaunchError(
            f"what listens at {host}:{port} is no rank 0 ({_first_line(error)}): write another MASTER_PORT"
        ) from error


def _open(host: str, port: int, *, is_master: bool, deadline: float) -> TCPStore:
    return TCPStore(
        host,
        port,
        is_master=is_master,
        timeout=timedelta(seconds=min(60.0, max(1.0, deadline - time.monotonic()))),
        wait_for_workers=False,
        multi_tenant=True,  # torch then finds it, when it makes the process group on the same port
    )


def _await(
    is_done: Callable[[], bool],
    deadline: float,
    waits_for: Callable[[], str] | None = None,
) -> bool:
    """Asks until it is done, or late; says once what it waits for."""
    start, has_said = time.monotonic(), False
    while not is_done():
        if time.monotonic() > deadline:
            return False
        if waits_for is not None and not has_said and time.monotonic() - start > _NOTICE_S:
            has_said = True
            left_s = deadline - time.monotonic()
            print(f"chunkdist: waiting {left_s:.0f} s more: {waits_for()}", file=sys.stderr, flush=True)
        time.sleep(_STEP_S)
    return True


def _absent(store: TCPStore, size: int) -> list[int]:
    return [rank for rank in range(size) if not store.check([f"chunkdist/present/{rank}"])]


def _missing(ranks: list[int], size: int) -> str:
    kind = "ranks" if len(ranks) > 1 else "rank"
    return f"{kind} {', '.join(map(str, ranks))} of WORLD_SIZE={size} did not come; {_UNSET}"


def _gave_up(what: str, wait_s: float) -> str:
    return f"after {wait_s:.0f} s, {what}"


def _is_one_machine(host: str, environment: Mapping[str, str]) -> bool:
    """Whether all ranks are here, as far as the launcher has told."""
    num_nodes = environment.get("CROSS_SIZE") or environment.get("GROUP_WORLD_SIZE")
    if num_nodes is not None:
        return num_nodes == "1"
    return host in ("localhost", "127.0.0.1", "::1") or environment.get(
        "LOCAL_WORLD_SIZE"
    ) == environment.get("WORLD_SIZE")


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0]
