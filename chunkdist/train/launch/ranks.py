"""Ranks on machines with and without accelerators, whichever launcher started them."""

from __future__ import annotations

import importlib
import os
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType  # type: ignore[import-untyped]
from torch.distributed.fsdp import CPUOffloadPolicy

from chunkdist.sharding.refuse_sequence import refuse_parallelism_config

if TYPE_CHECKING:
    from transformers import TrainingArguments

UNSHARDED, FSDP, ZERO12, ZERO3 = "DDP or one process", "FSDP2", "ZeRO-1 or ZeRO-2", "ZeRO-3"
PIPELINE = "pipeline"
"""What `engine_name` says."""


def num_launched_ranks() -> int:
    """How many processes the launcher started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launcher_wants_fsdp() -> bool:
    """Whether `accelerate launch` was given a config with FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def needs_gloo() -> bool:
    """Whether ranks have no accelerator.

    Accelerate (1.15) then makes no process group unless told to use the CPU: each rank would train alone, on
    the same data. FSDP needs one for a single rank, too.
    """
    ranks_are_joined = num_launched_ranks() > 1 or (launcher_wants_fsdp() and "LOCAL_RANK" in os.environ)
    return ranks_are_joined and not torch.accelerator.is_available()


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


def allow_fsdp(state: Any) -> None:
    """Tells Accelerate's `PartialState` to shard without an accelerator.

    Accelerate (1.15) turns to FSDP only from the kinds of ranks that have one; of CPU ranks it makes DDP, and
    says nothing.
    """
    state.distributed_type = DistributedType.MULTI_GPU


def leave_offloaded_unpinned(accelerator: Any) -> None:
    """FSDP2's offloaded weights stay in ordinary memory where no accelerator could copy from pinned memory:
    torch (2.13) would raise."""
    plugin: Any = getattr(accelerator.state, "fsdp_plugin", None)
    if isinstance(getattr(plugin, "cpu_offload", None), CPUOffloadPolicy) and needs_gloo():
        plugin.cpu_offload = CPUOffloadPolicy(pin_memory=False)


def check_ranks(accelerator: Any) -> None:
    """Raises where the trainer has other ranks than the launcher started, or does not shard as it was told.

    Raises:
        RuntimeError: each process would train alone, or hold all weights.
    """
    num_processes = accelerator.num_processes
    if num_processes != num_launched_ranks():
        raise RuntimeError(
            f"the launcher started {num_launched_ranks()} processes, the trainer knows of {num_processes}: "
            "no process group was made; without a GPU write use_cpu: true, with one see that torch finds it"
        )
    kind = accelerator.distributed_type
    if launcher_wants_fsdp() and kind != DistributedType.FSDP:
        raise RuntimeError(
            f"ACCELERATE_USE_FSDP=true, and Accelerate has made distributed_type={kind.value}, which does "
            "not shard: start with `accelerate launch --config_file configs/accelerate/fsdp2.yaml`, without "
            "--deepspeed, or unset ACCELERATE_USE_FSDP"
        )


def engine_name(args: TrainingArguments) -> str:
    """The name of the sharding engine that the options and the launcher's environment ask for; ZeRO-1 and
    ZeRO-2 have
    one name, as they have one format of checkpoints."""
    if getattr(args, "pipeline_stages", 1) > 1:
        return PIPELINE
    deepspeed = getattr(args, "hf_deepspeed_config", None)
    if deepspeed is not None:
        return ZERO3 if deepspeed.is_zero3() else ZERO12
    return FSDP if launcher_wants_fsdp() or args.fsdp else UNSHARDED


def check_engine(args: TrainingArguments) -> None:
    """Raises where a setting would lose the result, or leave ranks waiting for each other.

    Raises:
        ValueError: names both settings.
    """
    deepspeed = getattr(args, "hf_deepspeed_config", None)
    refuse_parallelism_config(getattr(args, "parallelism_config", None), deepspeed)
    if (
        deepspeed is not None
        and deepspeed.is_zero3()
        and not deepspeed.get_value("zero_optimization.stage3_gather_16bit_weights_on_model_save")
    ):
        raise ValueError(
            "stage3_gather_16bit_weights_on_model_save is not true, with zero_optimization.stage=3: the "
            "trained model could not be saved, each rank has a part of it; write true"
        )
    if _fsdp_version(args) == 1:
        raise ValueError(
            "fsdp_version=1 in Accelerate's config, and chunkdist shards with fsdp_version=2 only: its "
            "groups are kept whole by FSDP2's units; write fsdp_version: 2"
        )
    if num_launched_ranks() > 1 and not args.average_tokens_across_devices:
        raise ValueError(
            f"average_tokens_across_devices=False with {num_launched_ranks()} ranks: losses would be divided "
            "by the supervised tokens of one rank, not by those of the global batch: write true"
        )
    accelerator: Any = args.accelerator_config
    if num_launched_ranks() > 1 and not accelerator.even_batches and not args.dataloader_drop_last:
        raise ValueError(
            f"accelerator_config.even_batches=False with {num_launched_ranks()} ranks and "
            "dataloader_drop_last=False: a rank without data at the end would leave the others waiting: "
            "write one of them as true"
        )


def _fsdp_version(args: TrainingArguments) -> int | None:
    if getattr(args, "hf_deepspeed_config", None) is not None:
        return None
    if args.fsdp:
        settings: Any = args.fsdp_config
        return int((settings or {}).get("version", 2))
    return int(os.environ.get("FSDP_VERSION", "1")) if launcher_wants_fsdp() else None
