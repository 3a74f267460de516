"""Launchers' variables that do not fit, and ranks that never meet: one error each, soon."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from datetime import timedelta

import pytest

from chunkdist.train.launch import roll_call
from chunkdist.train.launch.roll_call import LaunchError, check_launch, forget_stale_rank, meet

SOON = timedelta(seconds=1.5)
TWO = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}

FAULTS = {
    "RANK=5 is out of range for WORLD_SIZE=2": {"RANK": "5"},
    "RANK=2 is out of range for WORLD_SIZE=2": {"RANK": "2"},
    "RANK=-1 is out of range": {"RANK": "-1"},
    "RANK='one' is no whole number": {"RANK": "one"},
    "WORLD_SIZE='2.0' is no whole number": {"WORLD_SIZE": "2.0"},
    "WORLD_SIZE=0": {"WORLD_SIZE": "0"},
    "LOCAL_RANK='x' is no whole number": {"LOCAL_RANK": "x"},
    "LOCAL_RANK=3 is out of range for LOCAL_WORLD_SIZE=2": {"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "2"},
    "LOCAL_RANK=-1 is out of range": {"LOCAL_RANK": "-1"},
    "MASTER_PORT='http' is no whole number": {"MASTER_PORT": "http"},
    "MASTER_PORT=70000 is no port": {"MASTER_PORT": "70000"},
    "WORLD_SIZE=2 without RANK": {"RANK": ""},
    "without LOCAL_RANK": {"LOCAL_RANK": ""},
    "without MASTER_ADDR": {"MASTER_ADDR": ""},
    "without RANK and LOCAL_RANK and MASTER_ADDR and MASTER_PORT": dict.fromkeys(TWO, "")
    | {"WORLD_SIZE": "2"},
}


@pytest.mark.parametrize("said", FAULTS)
def test_variables_that_do_not_fit_are_refused(said: str) -> None:
    with pytest.raises(LaunchError) as error:
        check_launch(TWO | FAULTS[said])
    assert said in str(error.value)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"LOCAL_RANK": "1"},
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"WORLD_SIZE": ""},
        TWO,
        TWO | {"RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},
    ],
)
def test_variables_that_fit_are_taken(environment: dict[str, str]) -> None:
    check_launch(environment)


@pytest.fixture
def port() -> Iterator[str]:
    """One that something else listens on."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        yield str(listener.getsockname()[1])


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return str(listener.getsockname()[1])


def test_a_port_in_use_is_named(port: str) -> None:
    with pytest.raises(LaunchError, match=rf"MASTER_PORT={port} is in use on this machine.*--master_port"):
        meet(SOON, TWO | {"MASTER_PORT": port})


def test_rank_0_names_who_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(roll_call, "_NOTICE_S", 0.5)
    start = time.monotonic()
    with pytest.raises(LaunchError, match=r"after 2 s, ranks 1, 2 of WORLD_SIZE=3 did not come") as error:
        meet(SOON, TWO | {"MASTER_PORT": free_port(), "WORLD_SIZE": "3"})
    assert time.monotonic() - start < 20
    assert error.value.speaks
    assert "more: ranks 1, 2 of WORLD_SIZE=3 did not come" in capsys.readouterr().err


def test_a_rank_0_that_is_not_there_is_named() -> None:
    port = free_port()
    with pytest.raises(LaunchError, match=rf"rank 0 is not at 127.0.0.1:{port} \(Connection refused\)"):
        meet(SOON, TWO | {"MASTER_PORT": port, "RANK": "1", "LOCAL_RANK": "1"})
    with pytest.raises(LaunchError, match=r"MASTER_ADDR='no-such-host.invalid' is the name of no machine"):
        meet(SOON, TWO | {"MASTER_ADDR": "no-such-host.invalid"})


def test_ranks_meet_and_others_say_who_is_missing() -> None:
    """Ranks 0 and 1 of two; then of three."""
    for size, ends in (("2", [None, None]), ("3", ["rank 2 of WORLD_SIZE=3"] * 2)):
        environment = TWO | {"MASTER_PORT": free_port(), "WORLD_SIZE": size}
        found: dict[int, object] = {}

        def come(
            rank: int, environment: dict[str, str] = environment, found: dict[int, object] = found
        ) -> None:
            try:
                found[rank] = meet(SOON, environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            except LaunchError as error:
                found[rank] = error

        threads = [threading.Thread(target=come, args=(rank,)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        for rank, end in enumerate(ends):
            assert isinstance(found[rank], LaunchError) == (end is not None), found
            assert end is None or end in str(found[rank])


def test_one_process_and_ranks_of_torchrun_have_nobody_to_meet() -> None:
    assert meet(SOON, {}) is None
    assert meet(SOON, TWO | {"TORCHELASTIC_USE_AGENT_STORE": "True"}) is None


def test_a_stale_local_rank_is_dropped_and_a_launchers_kept(capsys: pytest.CaptureFixture[str]) -> None:
    for stale in ({"LOCAL_RANK": "1"}, {"LOCAL_RANK": "0", "WORLD_SIZE": "1", "RANK": "0"}):
        forget_stale_rank(stale)
        assert "LOCAL_RANK" not in stale
        assert "is ignored" in capsys.readouterr().out
    of_a_launcher = TWO | {"WORLD_SIZE": "1"}
    forget_stale_rank(of_a_launcher)
    assert of_a_launcher["LOCAL_RANK"] == "0"


def test_one_machine_is_waited_for_less_long() -> None:
    assert roll_call._is_one_machine("127.0.0.1", TWO)
    assert roll_call._is_one_machine("node0", TWO | {"CROSS_SIZE": "1"})
    assert not roll_call._is_one_machine("127.0.0.1", TWO | {"CROSS_SIZE": "2"})
    assert roll_call._is_one_machine("node0", TWO | {"LOCAL_WORLD_SIZE": "2"})
    assert not roll_call._is_one_machine("node0", TWO | {"LOCAL_WORLD_SIZE": "1"})
