"""What is said when a GPU's memory is not enough: where it went by the estimate, and what would fit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from chunkdist.chunking import chunk_report, model_sizes
from chunkdist.config import ChunkConfig
from chunkdist.memory import machine as allocator
from chunkdist.memory.auto import USABLE_SHARE, card_of, free_bytes
from chunkdist.memory.planner import Job, NothingFits, gib, plan_step
from chunkdist.models.flops import StepFlops
from chunkdist.recovery import is_out_of_memory
from chunkdist.sharding.fsdp2 import device_of
from chunkdist.stores.free_memory import free_host_bytes
from chunkdist.train.launch.engine import engine_of
from chunkdist.train.reports.start_table import step_sizes

if TYPE_CHECKING:
    from transformers import Trainer

_NUM_LARGEST = 3


@contextmanager
def explained_out_of_memory(trainer: Trainer, *, is_chunked: bool) -> Iterator[None]:
    """Around training.

    Raises:
        torch.OutOfMemoryError: for one that was raised inside, with an explanation.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_chunked or not is_out_of_memory(error):
            raise
        raise torch.OutOfMemoryError(f"{_first_sentence(error)}; {explanation(trainer)}") from error


def explanation(trainer: Trainer) -> str:
    """The largest terms of the estimate, and the fastest schedule that fits, for the longest row."""
    model, args = trainer.model, trainer.args
    assert model is not None
    settings = step_sizes(args, getattr(trainer, "stream_tokens", None))
    num_tokens, config = settings.num_tokens, chunk_report(model).config
    if num_tokens is None:
        return "the length of the rows is not known: write max_length"
    device = device_of(model)
    reserved = torch.cuda.memory_reserved(device) if device.type == "cuda" else 0
    unused = reserved - torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    engine = engine_of(args)
    job = Job(
        sizes=model_sizes(model, settings.activation_bytes, engine.weights_dtype),
        flops=StepFlops.of(model),
        card=card_of(device),
        # All that this process could have, other processes' not counted; a margin for what makes gaps.
        available_bytes=int((free_bytes(device) - unused + reserved) * USABLE_SHARE["cuda"]),
        host_bytes=int(free_host_bytes() * USABLE_SHARE["cpu"]),
        num_rows=settings.num_rows,
        engine=engine,
        optimizer=settings.optimizer,
        num_micro_batches=settings.num_micro_batches,
    )
    parts = job.estimate(config, num_tokens).device
    largest = sorted(parts.items(), key=lambda part: -part[1])[:_NUM_LARGEST]
    told = ", ".join(f"{name} {gib(size)}" for name, size in largest)
    needed = f"by the estimate, {num_tokens:,} tokens need {gib(sum(parts.values()))}: {told}"
    said = f"{needed}; {_advice(job, num_tokens)}"
    if "expandable_segments:True" not in (allocator.setting() or ""):
        said += f"; {allocator.VARIABLES[0]}=expandable_segments:True leaves fewer gaps"
    return said


def _advice(job: Job, num_tokens: int) -> str:
    everything = ChunkConfig(
        chunk_size="auto", layers_per_group="auto", retained_chunks="auto", offload="auto"
    )
    try:
        chosen = plan_step(job, everything, num_tokens)
    except NothingFits as error:
        return str(error)
    config = chosen.config
    return (
        f"{gib(chosen.estimate.peak_bytes)} of {gib(job.available_bytes)} are enough with chunk_size: "
        f"{config.chunk_size}, layers_per_group: {config.layers_per_group}, retained_chunks: "
        f"{config.retained_chunks}, chunk_rebuild_kv: {str(config.rebuilds_kv).lower()}, "
        f"chunk_keep_attention: {str(config.keeps_attention).lower()}, chunk_offload: {config.offload}"
    )


def _first_sentence(error: BaseException) -> str:
    return " ".join(str(error).split()).split(". ")[0]
