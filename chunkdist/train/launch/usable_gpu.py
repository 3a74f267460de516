"""Whether the machine's GPU can be trained on: asked before anything is loaded, answered in one line.

torch says no more than `cuda.is_available() == False` where the driver is too old for it, and trainers then
take the CPU. Where it says yes, the first kernel may still fail.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

from chunkdist.recovery import is_out_of_memory

DRIVERS = {13: 580, 12: 525}
"""CUDA's major version -> the oldest driver on which builds of torch for it run (NVIDIA's release notes of
CUDA 12 and 13: minor versions are compatible)."""
OLDER_WHEELS = "https://download.pytorch.org/whl/cu126"


def why_gpu_is_idle(root: Path = Path("/")) -> str | None:
    """Why torch does not use an NVIDIA GPU that is here, and what to do; `None`: it does, or there is none.

    Args:
        root: Where `dev` and `proc` are.
    """
    has_card = any(root.glob("dev/nvidia[0-9]*"))
    if (
        not has_card
        or torch.accelerator.is_available()
        or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    ):
        return None
    driver = driver_version(root)
    told = "this machine has an NVIDIA GPU, and torch does not use it: "
    if torch.version.cuda is None:
        return f"{told}torch {torch.__version__} is built without CUDA; pip install a build with it"
    wanted = DRIVERS.get(int(torch.version.cuda.partition(".")[0]), max(DRIVERS.values()))
    if driver is not None and int(driver.partition(".")[0]) < wanted:
        return (
            f"{told}torch {torch.__version__} is built for CUDA {torch.version.cuda}, which needs driver "
            f"{wanted} or newer, and this one is {driver}; install a newer driver, or pip install torch "
            f"--index-url {OLDER_WHEELS} (driver {DRIVERS[12]} and newer)"
        )
    return f"{told}torch.cuda.is_available() is false with driver {driver or 'unknown'}; see `nvidia-smi`"


def refuse_idle_gpu(root: Path = Path("/")) -> None:
    """For a run that was not told to use the CPU.

    Raises:
        RuntimeError: there is an NVIDIA GPU and torch does not use it.
    """
    asked = ("ACCELERATE_USE_CPU", "true"), ("DS_ACCELERATOR", "cpu")
    if any(os.environ.get(name, "").lower() == value for name, value in asked):
        return
    if (why := why_gpu_is_idle(root)) is not None:
        raise RuntimeError(f"{why}; or write use_cpu: true to train on the CPU")


def try_first_kernel(device: torch.device) -> None:
    """Runs a small kernel and a matrix product, and waits for them.

    Raises:
        RuntimeError: why the device cannot be used, and what to do.
    """
    try:
        x = torch.ones(16, 16, device=device)
        (x @ x).sum().item()
    except RuntimeError as error:
        raise RuntimeError(_explained(error, device)) from error


def driver_version(root: Path = Path("/")) -> str | None:
    """The NVIDIA driver's version, as its kernel module tells it."""
    try:
        told = (root / "proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"\b(\d{3,}\.\d+(?:\.\d+)?)\b", told)
    return found[1] if found else None


def _explained(error: RuntimeError, device: torch.device) -> str:
    said = " ".join(str(error).split()).partition(". ")[0]
    if "no kernel image" in said:
        capability = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
        built = " ".join(torch.cuda.get_arch_list())
        return (
            f"torch {torch.__version__} has no kernels for this GPU ({capability}; it is built for {built}): "
            f"pip install a build that has them, say --index-url {OLDER_WHEELS}"
        )
    if is_out_of_memory(error):
        return (
            f"{device} has no memory left for the first kernel ({said}): end what else runs on it "
            "(`nvidia-smi` lists it), or write CUDA_VISIBLE_DEVICES for another GPU"
        )
    if "busy or unavailable" in said:
        return (
            f"{device} is taken ({said}): another process has it for itself (`nvidia-smi -q -d COMPUTE` "
            "tells the mode); end that, or write CUDA_VISIBLE_DEVICES for another GPU"
        )
    return f"the first kernel on {device} failed ({said}): run `chunkdist doctor`, and see `nvidia-smi`"
