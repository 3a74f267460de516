"""Ranks on machines with and without accelerators, whichever launcher started them."""

from __future__ import annotations

import os

import torch


def num_launched_ranks() -> int:
    """How many processes the launcher started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def needs_gloo() -> bool:
    """Whether ranks have no accelerator.

    Accelerate (1.15) then makes no process group unless told to use the CPU: each rank would train alone, on
    the same data.
    """
    return num_launched_ranks() > 1 and not torch.accelerator.is_available()


def skip_shm_build() -> None:
    """Keeps DeepSpeed (0.19) from compiling its shared-memory collectives for CPU ranks, unused in training.

    That takes a minute and a C++ compiler, and a process that is killed meanwhile leaves a lock file at which all
    later runs wait for ever.
    """
    import deepspeed.comm.torch

    deepspeed.comm.torch.build_shm_op = lambda: None


def check_ranks(num_processes: int) -> None:
    """Raises where the trainer has other ranks than the launcher started.

    Raises:
        RuntimeError: each process would train alone.
    """
    if num_processes != num_launched_ranks():
        raise RuntimeError(
            f"the launcher started {num_launched_ranks()} processes, the trainer knows of {num_processes}: "
            "no process group was made; without a GPU write use_cpu: true, with one see that torch finds it"
        )
