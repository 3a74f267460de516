"""What the arguments of all trainers share, whatever TRL's own are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import TrainingArguments

from chunkdist.train.launch.gloo import use_one_gloo_thread, wake_without_preempting
from chunkdist.train.launch.ranks import (
    allow_fsdp,
    launcher_wants_fsdp,
    needs_gloo,
    skip_shm_build,
    start_gloo,
    tell_ranks,
)
from chunkdist.train.launch.roll_call import meet
from chunkdist.train.launch.usable_gpu import refuse_idle_gpu
from chunkdist.train.options.chunk_options import option

# A base whose fields are TRL's would take back the defaults that TRL's classes set.
if TYPE_CHECKING:
    _Base = TrainingArguments
else:
    _Base = object


@dataclass
class RunArguments(_Base):
    """Before TRL's own class among the bases: gradient checkpointing is off, since a chunked step is its own,
    and a process group is made that the machine can have."""

    # `None`, not `False`: recent versions of transformers take any other value for the deprecated spelling.
    gradient_checkpointing: bool | None = option(
        None, "Hugging Face's gradient checkpointing, for chunk_method: none. A chunked step switches it off."
    )

    enable_jit_checkpoint: bool = option(
        True,
        "SIGTERM and SIGINT save a checkpoint when the step ends, and the run leaves with exit status 75; a "
        "second signal ends it at once. false: they end it without saving.",
    )

    def __post_init__(self) -> None:
        if self.report_to is None:
            self.report_to = "none"  # transformers (5.23) would look for a tracker named None
        if not self.use_cpu:
            refuse_idle_gpu()
        use_one_gloo_thread()
        if needs_gloo():
            wake_without_preempting()
        store = meet(self.ddp_timeout_delta)  # noqa: F841  # until the process group is made
        if self.deepspeed:
            skip_shm_build()
        elif needs_gloo():
            self.use_cpu = True
            start_gloo(self.ddp_timeout_delta)
        super().__post_init__()  # type: ignore[no-untyped-call]
        if self.deepspeed and needs_gloo():
            tell_ranks(self.distributed_state)
        elif needs_gloo() and (launcher_wants_fsdp() or self.fsdp):
            allow_fsdp(self.distributed_state)

    def __getstate__(self) -> dict[str, Any]:
        """What transformers pickles into each `training_args.bin`: everything but the key to the Hub."""
        return {**self.__dict__, "hub_token": None}

    def _validate_args(self) -> None:
        """For transformers, bf16 without a GPU needs `use_cpu`, which DeepSpeed must not be given."""
        given = self.use_cpu
        self.use_cpu = given or bool(self.deepspeed and needs_gloo())
        super()._validate_args()  # type: ignore[no-untyped-call]
        self.use_cpu = given
