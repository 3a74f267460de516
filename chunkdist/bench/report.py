"""One run of a benchmark: its options, one JSON file, one printed table.

The file holds what ran where (the exact command, versions, hardware), and a row for each figure. It is
written after each row, so that a run that is stopped leaves what it had, marked as `partial`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import shlex
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from chunkdist.bench import module_of
from chunkdist.bench.figures import row_name, table
from chunkdist.bench.options import checked
from chunkdist.files import whole_file
from chunkdist.memory import machine as allocator

_PACKAGES = ("chunkdist", "torch", "transformers", "peft")


class Run:
    """A run of the benchmark whose parser it is.

    Attributes:
        options: What the command line says.
        result: What the JSON holds; `rows` are in it.
        device, dtype, num_rounds: What is run on, in what, how often.
    """

    def __init__(self, parser: argparse.ArgumentParser, given: Sequence[str], **more: Any) -> None:
        self.options = checked(parser, given)
        self.device: str = getattr(self.options, "device", "cpu")
        self.on_gpu = self.device.startswith("cuda")
        self.dtype = torch.bfloat16 if self.on_gpu else torch.float32
        self.num_rounds: int = getattr(self.options, "repetitions", 1)
        name = parser.prog.rpartition(" ")[2]
        self.result: dict[str, Any] = {
            "benchmark": name,
            "command": shlex.join(["chunkdist", "bench", name, *given]),
            "versions": versions(),
            "hardware": hardware(self.device),
            **({"num_repetitions": self.num_rounds} if hasattr(self.options, "repetitions") else {}),
            **more,
            "rows": [],
        }
        self.rows: list[dict[str, Any]] = self.result["rows"]

    def add(self, **row: Any) -> None:
        """Adds a row, and writes what there is."""
        self.rows.append(row)
        self.save()

    def save(self, *, partial: bool = True) -> None:
        """Writes what there is. A run that is stopped in this leaves the file before."""
        file: Path | None = self.options.json
        if file is not None:
            whole = {**self.result, "partial": True} if partial else self.result
            with whole_file(file) as unfinished:
                unfinished.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")

    def end(self) -> None:
        """Writes and prints all of it."""
        self.save(partial=False)
        print(text(self.result))


def text(result: dict[str, Any]) -> str:
    """A result for people to read: the table that its benchmark names, and what its columns mean."""
    module = importlib.import_module(module_of(result["benchmark"]))
    plans = [f"{row_name(row)}: {row['plan']}" for row in result["rows"] if "plan" in row]
    return "\n\n".join([source(result), table(result["rows"], module.COLUMNS), *plans, module.NOTE])


def source(result: dict[str, Any]) -> str:
    """The model and the machine of a result."""
    model, machine, parts = result.get("model", {}), result["hardware"], []
    if "num_parameters" in model:
        parts.append(f"Llama of {model['num_parameters'] / 1e6:.1f}M parameters")
    names = {"num_layers": "layers", "num_tokens": "tokens", "lora_rank": "LoRA rank"}
    parts += [f"{title} {model[name]:,}" for name, title in names.items() if model.get(name)]
    parts.append(machine.get("gpu") or f"{machine['num_threads']} thread(s) of {machine['cpu']}")
    if result.get("memory_gib") is not None:
        parts.append(f"within {result['memory_gib']:g} GiB (the allocator: {result['memory_gib'] - 1:g})")
    if "num_repetitions" in result:
        parts.append(f"medians of {result['num_repetitions']}")
    return ", ".join(parts)


def versions() -> dict[str, str]:
    """The versions of Python and of what a benchmark imports."""
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
