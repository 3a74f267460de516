"""Free host memory: the machine's, the control groups' limits, and one rank's part of it."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch

from chunkdist.memory.auto import free_bytes
from chunkdist.stores.free_memory import free_host_bytes

GROUP = "/job.slice/task"


def control_groups(root: Path, version: int, *, limits: dict[str, str], used: int, cache: int) -> Path:
    """Files of the kernel for a process in `GROUP`; `limits`: of its group and of those around it."""
    top = root / "sys/fs/cgroup" / ("" if version == 2 else "memory")
    (root / "proc/self").mkdir(parents=True)
    name = "0::" if version == 2 else "7:cpu,cpuacct:/other\n5:memory:"
    (root / "proc/self/cgroup").write_text(f"{name}{GROUP}\n")
    most, usage, stat = (
        ("memory.max", "memory.current", "inactive_file")
        if version == 2
        else ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    )
    for path, limit in limits.items():
        folder = top / path.lstrip("/")
        folder.mkdir(parents=True, exist_ok=True)
        for file, text in ((most, limit), (usage, str(used)), ("memory.stat", f"anon 5\n{stat} {cache}")):
            (folder / file).write_text(text)
    return root


@pytest.mark.parametrize("version", [1, 2])
def test_the_tightest_control_group_limits(
    tmp_path: Path, version: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = {"/": "9000000", "/job.slice": "5000000", GROUP: "max" if version == 2 else str(2**63 - 4096)}
    root = control_groups(tmp_path, version, limits=limits, used=3_000_000, cache=500_000)
    assert free_host_bytes(root) == 2_500_000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_host_bytes(root) == 625_000


def test_without_limits_it_is_the_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    whole = psutil.virtual_memory().total
    assert 0.1 * whole < free_host_bytes(tmp_path) <= whole
    root = control_groups(tmp_path, 2, limits={GROUP: "max"}, used=1, cache=0)
    assert free_host_bytes(root) == pytest.approx(psutil.virtual_memory().available, rel=0.2)


def test_ranks_share_what_auto_may_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    alone = free_bytes(torch.device("cpu"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert free_bytes(torch.device("cpu")) == pytest.approx(alone / 8, rel=0.2)


@pytest.mark.parametrize(
    ("free_gib", "fraction", "expected_gib"),
    [(80, 1.0, 80 + 4), (80, 0.25, 13 + 4), (5, 0.25, 5 + 4), (80, 0.05, 4)],
)
def test_a_gpu_has_no_more_than_the_process_may_take(
    free_gib: int, fraction: float, expected_gib: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 100 GiB, this process holds 12, of which it uses 8."""
    sizes = {"memory_reserved": 12, "memory_allocated": 8}
    for name, gib in sizes.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, gib=gib: gib * 2**30)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free_gib * 2**30, 100 * 2**30))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: fraction)
    assert free_bytes(torch.device("cuda")) == expected_gib * 2**30
