"""What `sequence_parallel_size` excludes: all refusals that follow from the options alone."""

from __future__ import annotations

from typing import Any

from chunkdist.config import AUTO_FIELDS, ChunkConfig
from chunkdist.train.launch.ranks import num_launched_ranks
from chunkdist.train.options.arguments import TrainingOptions


def check_shared_rows(
    options: TrainingOptions, chunk_config: ChunkConfig | None, *, will_train: bool = True
) -> None:
    """Raises where ranks cannot share rows (`sequence_parallel_size`).

    Args:
        will_train: With the ranks that there are.

    Raises:
        ValueError: says what to write instead.
    """
    training, chunk = options.training, options.chunk
    size = training.sequence_parallel_size
    if size == 1:
        return
    ranks = num_launched_ranks() if will_train else size
    if ranks % size:
        raise ValueError(
            f"sequence_parallel_size={size} with {ranks} rank(s): start a multiple of {size} "
            f"(torchrun --nproc_per_node {size})"
        )
    if chunk_config is None:
        raise ValueError(
            f"chunk_method=none with sequence_parallel_size={size}: chunked layers exchange tokens between "
            "ranks, plain ones do not; write chunk_method: seco"
        )
    for name in AUTO_FIELDS:
        if will_train and getattr(chunk_config, name) == "auto":
            raise ValueError(
                f"{name}=auto with sequence_parallel_size={size}: ranks might choose differently; write what "
                "`chunkdist plan` prints"
            )
    if chunk_config.chunk_size != "auto" and chunk_config.chunk_size % size:
        fit = max(1, int(chunk_config.chunk_size) // size) * size
        raise ValueError(
            f"chunk_size={chunk_config.chunk_size} with sequence_parallel_size={size}: the ranks share each "
            f"chunk, write a multiple, such as {fit}"
        )
    accelerator: Any = training.accelerator_config
    refused = {
        "pipeline_stages": (training.pipeline_stages > 1, "write 1"),
        "oom": (chunk.oom == "shrink", "a rank that gives up would leave its group waiting; leave it out"),
        "chunk_share_prefixes": (
            chunk.chunk_share_prefixes == "true",
            "ranks share the tokens of each row as they are; leave it out",
        ),
        "dataset_streaming": (options.is_streaming, "samples are dealt to groups by number; write false"),
        "dispatch_batches": (bool(getattr(accelerator, "dispatch_batches", None)), "leave it out"),
        "router_aux_loss_coef": (
            bool(training.router_aux_loss_coef),
            "the balance loss of a rank's tokens is no part of the whole's; write 0.0",
        ),
    }
    for name, (is_set, instead) in refused.items():
        if is_set:
            parts: tuple[Any, ...] = (options.data, training, chunk, accelerator)
            value = next(getattr(part, name) for part in parts if hasattr(part, name))
            raise ValueError(f"{name}={value} with sequence_parallel_size={size}: {instead}")
