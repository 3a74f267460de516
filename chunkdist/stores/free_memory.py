"""Host memory that one process may still take: of the machine, and of the control groups it runs in."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def free_host_bytes(root: Path = Path("/"), *, num_ranks: int | None = None) -> int:
    """What is free, in equal parts for the ranks of this machine.

    Args:
        root: Where `proc` and `sys` are.
        num_ranks: `None`: `LOCAL_WORLD_SIZE`.
    """
    import psutil  # type: ignore[import-untyped]

    free = min([int(psutil.virtual_memory().available), *_free_of_control_groups(root)])
    return free // (num_ranks or max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def _free_of_control_groups(root: Path) -> Iterator[int]:
    """Free bytes of this process's group and those around it, versions 2 and 1; pages that can be read again
    from files
    count as free. A container sees its own group as the outermost one."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        top, limit, usage, cache = (
            ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file")
            if not controllers
            else (
                "sys/fs/cgroup/memory",
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "total_inactive_file",
            )
        )
        if controllers and "memory" not in controllers.split(","):
            continue
        parts = Path(path).parts[1:]
        for depth in range(len(parts) + 1):
            folder = root.joinpath(top, *parts[:depth])
            try:
                most, used = (int((folder / name).read_text(encoding="utf-8")) for name in (limit, usage))
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):  # no such group in here, or no limit ("max")
                continue
            yield max(0, most - used + int(stat.get(cache, 0)))
