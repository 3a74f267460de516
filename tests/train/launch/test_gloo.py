"""A gloo group has one worker thread, whoever makes it; with torch's two, ranks died now and then."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh

from chunkdist.train.launch.gloo import use_one_gloo_thread, wake_without_preempting
from chunkdist.train.options.arguments import parse_options

TIMEOUT = timedelta(seconds=77)


@pytest.fixture
def one_rank() -> Iterator[None]:
    use_one_gloo_thread()
    use_one_gloo_thread()  # once more changes nothing
    distributed.init_process_group(
        "gloo", rank=0, world_size=1, store=distributed.HashStore(), timeout=TIMEOUT
    )
    try:
        yield
    finally:
        distributed.destroy_process_group()


def options_of(group: Any) -> Any:
    return group._get_backend(torch.device("cpu")).options


@pytest.mark.usefixtures("one_rank")
def test_every_group_has_one_thread_and_its_timeout() -> None:
    """What torch, which has no public setting for it, tells of the groups."""
    whole, part = distributed.group.WORLD, distributed.new_group([0], timeout=timedelta(seconds=5))
    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("rows", "columns"))
    groups = [whole, part, *mesh.get_all_groups()]
    assert [options_of(group)._threads for group in groups] == [1, 1, 1, 1]
    assert [options_of(group)._timeout for group in (whole, part)] == [TIMEOUT, timedelta(seconds=5)]


def test_the_interfaces_that_torch_would_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo,lo")
    use_one_gloo_thread()
    distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
    try:
        options = options_of(distributed.group.WORLD)
        assert (len(options._devices), options._threads) == (2, 1)
    finally:
        distributed.destroy_process_group()


def run_in_a_thread(function: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(function).result()


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="not on Linux")
def test_threads_of_gloo_inherit_how_they_are_woken() -> None:
    def woken() -> tuple[int, int]:
        wake_without_preempting()
        return os.sched_getscheduler(0), run_in_a_thread(lambda: os.sched_getscheduler(0))

    assert run_in_a_thread(woken) == (os.SCHED_BATCH, os.SCHED_BATCH)


def test_the_launcher_says_so_before_it_makes_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    def meet(timeout: timedelta) -> None:
        raise RuntimeError(f"after {said}")

    said: list[str] = []
    of_launcher = "chunkdist.train.options.run_arguments"
    monkeypatch.setattr(f"{of_launcher}.meet", meet)
    monkeypatch.setattr(f"{of_launcher}.needs_gloo", lambda: True)
    for name in ("use_one_gloo_thread", "wake_without_preempting"):
        monkeypatch.setattr(f"{of_launcher}.{name}", partial(said.append, name))
    with pytest.raises((RuntimeError, ValueError), match=r"after .*one_gloo_thread.*wake_without_preempting"):
        parse_options(["--config", "configs/quickstart.yaml", "--report_to", "none", "--use_cpu", "true"])
