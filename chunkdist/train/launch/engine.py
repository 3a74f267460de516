"""The engine of a training run, as the estimate knows it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, cast

from chunkdist.memory.sharded import Engine, EngineName
from chunkdist.train.launch.ranks import FSDP, engine_name, num_launched_ranks

if TYPE_CHECKING:
    from transformers import TrainingArguments

_MAX_LIVE = 10**9
"""DeepSpeed's default of `stage3_max_live_parameters`."""


def engine_of(args: TrainingArguments) -> Engine:
    """From the options, DeepSpeed's config and the launcher's environment; weights may be placed or not."""
    num_ranks = num_launched_ranks()
    mixed = 2 if args.bf16 or args.fp16 else None
    deepspeed: Any = getattr(args, "hf_deepspeed_config", None)
    if deepspeed is not None:
        return engine_of_deepspeed(deepspeed, num_ranks, mixed)
    if engine_name(args) == FSDP:
        return Engine(name="fsdp2", num_ranks=num_ranks, gathered_element_bytes=mixed, **_fsdp_offload())
    return Engine(name="ddp" if num_ranks > 1 else "single", num_ranks=num_ranks)


def engine_of_deepspeed(deepspeed: Any, num_ranks: int, mixed: int | None) -> Engine:
    """What a DeepSpeed config makes.

    Args:
        deepspeed: Accelerate's or transformers' `HfDeepSpeedConfig`.
        mixed: Bytes of an activation's element under bf16 or fp16, else `None`.
    """

    def of_zero(name: str, default: Any) -> Any:
        return deepspeed.get_value(f"zero_optimization.{name}", default)

    stage, live = int(of_zero("stage", 0)), of_zero("stage3_max_live_parameters", _MAX_LIVE)
    bucket = of_zero("reduce_bucket_size", "auto")
    return Engine(
        name=cast(EngineName, f"zero{stage}") if stage else "ddp",
        num_ranks=num_ranks,
        gathered_element_bytes=mixed,
        offloads_weights=_is_offloaded(deepspeed, "offload_param"),
        offloads_optimizer=_is_offloaded(deepspeed, "offload_optimizer"),
        max_live_numbers=int(live) if live != "auto" else _MAX_LIVE,
        bucket_numbers=None if bucket == "auto" else int(bucket),
        master_bytes=2 if deepspeed.get_value("bf16.bf16_master_weights_and_grads", False) else 4,
        state_bytes=2 if deepspeed.get_value("bf16.bf16_optimizer_states", False) else 4,
    )


def _is_offloaded(deepspeed: Any, what: str) -> bool:
    device = deepspeed.get_value(f"zero_optimization.{what}.device", "none")
    return device not in (None, "none")


def _fsdp_offload() -> dict[str, bool]:
    offloads = os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true"
    return {"offloads_weights": offloads, "offloads_optimizer": offloads}
