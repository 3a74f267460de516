"""Versions, devices and attention backends of this machine, in rows for people to read."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from chunkdist.attention import BACKENDS
from chunkdist.attention.base import AttentionVariant

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "deepspeed",
    "trl",
    "datasets",
    "wandb",
    "flash-attn",
)


def environment_rows() -> list[tuple[str, str]]:
    """Name and value."""
    import chunkdist.chunking  # noqa: F401  registers the attention

    rows = [
        ("chunkdist", version_of("chunkdist")),
        ("python", f"{platform.python_version()} on {platform.platform()}"),
    ]
    rows += [(name, version_of(name)) for name in PACKAGES]
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    rows.append(("CUDA", f"{torch.version.cuda or 'not in this build of torch'}"))
    rows += [(f"GPU {index}", name) for index, name in enumerate(devices)] or [("GPU", "none")]
    dtype, device = (torch.bfloat16, "cuda") if devices else (torch.float32, "cpu")
    q_TND = torch.empty(1, 1, 128, dtype=dtype, device=device)
    for backend in BACKENDS:
        why_not = backend.why_not(q_TND, AttentionVariant(scale=1.0))
        rows.append((f"attention {backend.name}", "available" if why_not is None else f"not here: {why_not}"))
    return rows


def version_of(package: str) -> str:
    """The version of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
