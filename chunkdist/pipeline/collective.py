"""What the stages of a pipeline do together outside of a step: evaluation, the norm of gradients, and the
whole model in one place. All of it is collective."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor

from chunkdist.pipeline.schedule import schedule_1f1b
from chunkdist.pipeline.step import Pipeline, Sample


@torch.no_grad()
def evaluate(pipeline: Pipeline, batches: Sequence[Sequence[Sample]]) -> float:
    """The mean loss of the supervised tokens of a batch; the mean over batches, weighted by their samples.

    Args:
        batches: The same on all ranks of a pipeline; those of other replicas are added.
    """
    stage, was_training = pipeline.stage, pipeline.stage.training
    device = next(stage.parameters()).device
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    stage.eval()
    try:
        if pipeline.shards is not None:
            pipeline.shards.gather()
        for batch in batches:
            sums += torch.stack([_loss(pipeline, batch) * len(batch), sums.new_tensor(len(batch))])
    finally:
        stage.train(was_training)
        if pipeline.shards is not None:
            pipeline.shards.release()
    last = distributed.get_world_size(pipeline.group) - 1
    distributed.broadcast(sums, group_src=last, group=pipeline.group)
    if pipeline.replicas is not None:
        distributed.all_reduce(sums, group=pipeline.replicas)
    total, count = sums.tolist()
    return float(total / count)


def _loss(pipeline: Pipeline, batch: Sequence[Sample]) -> Tensor:
    """On the last stage; elsewhere 0. Stages wait for the one before them only."""
    stage, group = pipeline.stage, pipeline.group
    runs = pipeline.runs([len(sample["input_ids"]) for sample in batch])
    num_stages = distributed.get_world_size(group)
    schedule = schedule_1f1b([run.num_chunks for run in runs], num_stages=num_stages, retained_chunks=0)
    cells = pipeline.cells(batch, runs, schedule)
    device = next(stage.parameters()).device
    total = torch.zeros((), dtype=torch.float64, device=device)
    shape = (1, int(pipeline.config.chunk_size), stage.hidden_size)
    for number in range(len(schedule.micro_batches)):
        received = None
        if not stage.is_first:
            received = torch.empty(shape, dtype=stage.hidden_dtype, device=device)
            distributed.recv(received, group=group, group_src=pipeline.rank - 1)
        output = cells.cell(number).evaluate(received)
        if stage.is_last:
            total += output
        else:
            distributed.send(output.contiguous(), group=group, group_dst=pipeline.rank + 1)
    return total


def clip_grad_norm(pipeline: Pipeline, max_norm: float) -> Tensor:
    """Scales all stages' gradients down to `max_norm`; their norm before that, over all stages."""
    parameters = [p for p in pipeline.stage.parameters() if p.grad is not None]
    own = [local_part(p.grad) for p in parameters if p is not _second_of_tied(pipeline)]
    device = next(pipeline.stage.parameters()).device
    squares = torch.zeros((), dtype=torch.float64, device=device)
    for grad in own:
        wide = torch.promote_types(grad.dtype, torch.float32)
        squares += torch.linalg.vector_norm(grad, dtype=wide).double() ** 2
    if pipeline.shards is not None:
        distributed.all_reduce(squares, group=pipeline.replicas)
    distributed.all_reduce(squares, group=pipeline.group)
    norm = squares.sqrt().float()
    scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)  # as torch's clip_grad_norm_
    for parameter in parameters:
        local_part(parameter.grad).mul_(scale)
    return norm


def whole_state_dict(pipeline: Pipeline, model: nn.Module) -> dict[str, Tensor] | None:
    """The weights of all stages, in memory of the CPU, on the first rank of the pipeline; elsewhere `None`.

    Args:
        model: As its names are wanted: the pipeline's, or a PEFT model around it.
    """
    tied = _second_of_tied(pipeline)
    left_out = {name for name, p in model.named_parameters(remove_duplicate=False) if p is tied}
    own = {
        name: x.full_tensor() if isinstance(x, DTensor) else x
        for name, x in model.state_dict().items()
        if name not in left_out
    }
    forms = [(name, x.shape, x.dtype) for name, x in own.items()]
    group, count = pipeline.group, distributed.get_world_size(pipeline.group)
    every: list[list[tuple[str, torch.Size, torch.dtype]]] = [[] for _ in range(count)]
    distributed.all_gather_object(every, forms, group=group)
    if pipeline.rank:
        for x in own.values():
            distributed.send(x.detach().contiguous(), group=group, group_dst=0)
        return None
    device = next(pipeline.stage.parameters()).device
    whole = {name: x.detach().cpu() for name, x in own.items()}
    for stage in range(1, count):
        for name, shape, dtype in every[stage]:
            x = torch.empty(shape, dtype=dtype, device=device)
            distributed.recv(x, group=group, group_src=stage)
            whole[name] = x.cpu()
    return whole


def _second_of_tied(pipeline: Pipeline) -> nn.Parameter | None:
    """The last stage's copy of embeddings that the first one has as well."""
    stage = pipeline.stage
    if not stage.is_tied or not stage.is_last or stage.is_first:
        return None
    head: nn.Parameter = stage.model.get_output_embeddings().weight
    return head


def local_part(x: Any) -> Any:
    """This rank's part of a tensor that may be sharded; anything else as it is."""
    return x.to_local() if isinstance(x, DTensor) else x
