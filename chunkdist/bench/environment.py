"""What a benchmark's figures depend on beside the code, versions and hardware, and the file they go to."""

from __future__ import annotations

import json
import os
import platform
import shlex
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from chunkdist.memory import machine as allocator

_PACKAGES = ("chunkdist", "torch", "transformers", "peft")


def provenance(name: str, arguments: Sequence[str], *, device: str = "cpu") -> dict[str, Any]:
    """What every result begins with: the benchmark, its exact command, and what it ran on.

    Args:
        name: Of the benchmark; its module has that name, with underscores.
        arguments: Of its command line.
    """
    module = f"chunkdist.bench.{name.replace('-', '_')}"
    return {
        "benchmark": name,
        "command": shlex.join(["python", "-m", module, *arguments]),
        "versions": versions(),
        "hardware": hardware(device),
    }


def write_result(result: dict[str, Any], file: Path | None) -> None:
    """Writes a result as JSON, where a file is asked for. Stopped meanwhile, it leaves the one before."""
    if file is not None:
        part = file.with_name(f"{file.name}.part")
        part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        part.replace(file)


def write_partial(result: dict[str, Any], file: Path | None) -> None:
    """Writes what there is so far: until `write_result` replaces it, the file says that it is not all."""
    write_result({**result, "partial": True}, file)


def versions() -> dict[str, str]:
    """Of Python and of what a benchmark imports."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # run from the source tree
            found[package] = "not installed"
    return found


def hardware(device: str) -> dict[str, Any]:
    """The processor, its cores and threads, what else they had to do, and the GPU if one was used."""
    found: dict[str, Any] = {
        "cpu": _cpu_name(),
        "num_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "load_average_1_min": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"gpu": properties.name, "gpu_bytes": properties.total_memory, "cuda": torch.version.cuda}
        found["allocator"] = allocator.setting()
    return found


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
