"""Ranks on machines with and without accelerators, whichever launcher started them."""

from __future__ import annotations

import importlib
import os
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import TrainingArguments


def num_launched_ranks() -> int:
    """How many processes the launcher started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def needs_gloo() -> bool:
    """Whether ranks have no accelerator.

    Accelerate (1.15) then makes no process group unless told to use the CPU: each rank would train alone, on
    the same data.
    """
    return num_launched_ranks() > 1 and not torch.accelerator.is_available()


def start_gloo(timeout: timedelta) -> None:
    """Makes the process group of ranks without an accelerator.

    transformers (5.23) has Accelerate make it, and leaves out `ddp_timeout` where it uses the CPU.
    """
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", timeout=timeout)


def skip_shm_build() -> None:
    """Keeps DeepSpeed (0.19) from compiling its shared-memory collectives for CPU ranks, unused in training.

    That takes a minute and a C++ compiler, and a process that is killed meanwhile leaves a lock file at which
    all later runs wait for ever.
    """
    # As an attribute, `deepspeed.comm.torch` is torch itself.
    backend: Any = importlib.import_module("deepspeed.comm.torch")
    backend.build_shm_op = lambda: None


def tell_ranks(state: Any) -> None:
    """Tells Accelerate's `PartialState` its ranks, under DeepSpeed without an accelerator.

    Accelerate (1.15) finds no backend there and believes in one process: each rank would get the same data,
    and write the same files, though DeepSpeed's own process group is whole.
    """
    state.backend = "gloo"
    state.num_processes = torch.distributed.get_world_size()
    state.process_index = torch.distributed.get_rank()
    state.local_process_index = int(os.environ["LOCAL_RANK"])


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


def check_engine(args: TrainingArguments) -> None:
    """Raises where a setting would lose the result, or leave ranks waiting for each other.

    Raises:
        ValueError: names both settings.
    """
    deepspeed = getattr(args, "hf_deepspeed_config", None)
    if (
        deepspeed is not None
        and deepspeed.is_zero3()
        and not deepspeed.get_value("zero_optimization.stage3_gather_16bit_weights_on_model_save")
    ):
        raise ValueError(
            "stage3_gather_16bit_weights_on_model_save is not true, with zero_optimization.stage=3: the "
            "trained model could not be saved, each rank has a part of it; write true"
        )
    accelerator: Any = args.accelerator_config
    if num_launched_ranks() > 1 and not accelerator.even_batches and not args.dataloader_drop_last:
        raise ValueError(
            f"accelerator_config.even_batches=False with {num_launched_ranks()} ranks and "
            "dataloader_drop_last=False: a rank without data at the end would leave the others waiting: "
            "write one of them as true"
        )
