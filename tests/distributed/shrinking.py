"""A step that runs out of memory on one rank, and again with smaller chunks."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn

from chunkdist import chunk_model
from chunkdist.chunking import chunk_report, reschedule
from chunkdist.recovery import recovering
from chunkdist.train.build import build_trainer, chunk_trainer
from chunkdist.train.options.arguments import parse_options
from chunkdist.train.reports.callback import ChunkCallback
from tests.distributed.cases import Case, build, chunk_config, micro_batches, reference_step, shard_fsdp2
from tests.helpers.planted_memory import Place, memory_for
from tests.helpers.tiny_run import command_line

LENGTHS = (223, 245, 160, 231)


def largest_error_of_retry(case: Case, place: Place) -> float:
    """Of gradients, after a step in which rank 1 has had too little memory for whole chunks."""
    model = build(case, torch.float64)
    expected = reference_step(copy.deepcopy(model), case).gradients
    config = chunk_config(case)
    chunk_model(model, config)
    rank = distributed.get_rank()
    wrapped: Any = model
    if case.engine == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(model)
    else:
        shard_fsdp2(model, case)
    (inputs,) = micro_batches(case, rank)
    planted = memory_for(config.chunk_size // 2, place) if rank == 1 else nullcontext([])  # type: ignore[operator]
    with planted:
        with recovering() as recovery:
            wrapped(**inputs).loss.backward()
        assert (recovery.error is not None) == (rank == 1)
        wrapped.zero_grad(set_to_none=True)
        reschedule(model, chunk_size=int(config.chunk_size) // 2, reason="halved")
        with recovering() as recovery:
            wrapped(**inputs).loss.backward()
        assert recovery.error is None, recovery.error
    errors = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            grad: Any = parameter.grad
            whole = grad.full_tensor() if case.engine != "ddp" else grad
            errors.append(((whole - expected[name]).norm() / expected[name].norm()).item())
    return max(errors)


def weights_and_chunk_size(
    model: Path, planted_rank: int, values: dict[str, Any]
) -> tuple[list[float], int, list[float]]:
    """Trains two optimizer steps with memory for half a chunk on one rank; -1: on none. The weights, the
    chunk size, and the tokens that were counted."""
    rank, num_ranks = (distributed.get_rank(), distributed.get_world_size())
    folder = model.parent / f"rank{rank}-of-{num_ranks}-{planted_rank}"
    folder.mkdir()
    (folder / "model").symlink_to(model)
    rows = [{"input_ids": [(7 * n + 3 * i) % 200 for i in range(length)]} for n, length in enumerate(LENGTHS)]
    options = {
        "optim": "sgd",
        "learning_rate": 0.1,
        "report_to": "none",
        "chunk_check": False,
        "max_length": 256,
        **values,
    }
    trainer, config = build_trainer(parse_options(command_line(folder / "model", rows, **options)))
    chunk_trainer(trainer, config)
    ChunkCallback.add_to(trainer, config)
    with memory_for(64, "backward") if rank == planted_rank else nullcontext():
        trainer.train()
    assert trainer.model is not None
    weights: list[float] = torch.cat([p.detach().flatten() for p in trainer.model.parameters()]).tolist()
    counts = [row["num_tokens_seen"] for row in trainer.state.log_history if "num_tokens_seen" in row]
    assert len(counts) == 2
    return weights, chunk_report(trainer.model).chunk_size, counts
