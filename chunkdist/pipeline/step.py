"""A training step of a pipeline: sequences to chunks, chunks through the stages, in torch's pipeline runtime.

Every rank is given all sequences, so each plans the same and no plan is sent. What is sent are hidden states
of a chunk and their gradients, the loss, and the gradient of tied embeddings.

torch (2.13) has no public way to run a schedule of one's own: `_PipelineScheduleRuntime` and `_Action` are
private names, and used here only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining.schedules import _Action, _PipelineScheduleRuntime
from torch.nn import functional as F
from transformers import PreTrainedModel

from chunkdist.config import ChunkConfig
from chunkdist.data.streams import NO_LABEL, join_sequences, stream_of
from chunkdist.pipeline.cell import StageCell
from chunkdist.pipeline.runs import Run, pack_runs
from chunkdist.pipeline.schedule import PipelineSchedule, schedule_1f1b
from chunkdist.pipeline.stage import ModelStage
from chunkdist.pipeline.stage_fsdp import StageShards
from chunkdist.pipeline.torch_stage import LazyBufferStage
from chunkdist.stream.packed import refuse_segments
from chunkdist.stream.stream import Chunk

Sample = Mapping[str, Any]


class Pipeline:
    """One rank's stage of a model, and the steps that it takes with the others.

    Args:
        model: The whole model; what other stages have is let go.
        stages: The layers of all ranks, in their order: what `cut_stages` gives.
        group: The ranks of the pipeline; `None`: all.
        replicas: One-dimensional: the ranks that have the same stage in other pipelines, which train on other
            sequences; `None`: there are none. They begin with the weights of the first one, and a step ends
            with collectives among them.
        shards_weights: The replicas share a stage's weights, by FSDP2: parameters are `DTensor`s between
            steps.
        device: Where the stage goes, once what other stages have is let go; `None`: it stays where it is.
        retained_chunks: By stage, in the place of the config's.
        forwards_ahead: As in `schedule_1f1b`.

    Raises:
        ValueError: the numbers of stages and ranks differ, or the config asks for what a pipeline has not.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: ChunkConfig,
        stages: Sequence[range],
        *,
        group: distributed.ProcessGroup | None = None,
        replicas: DeviceMesh | None = None,
        shards_weights: bool = False,
        device: torch.device | None = None,
        retained_chunks: Sequence[int] | None = None,
        forwards_ahead: int = 1,
    ) -> None:
        num_ranks, self.rank = distributed.get_world_size(group), distributed.get_rank(group)
        if len(stages) != num_ranks:
            raise ValueError(
                f"{len(stages)} stages for {num_ranks} ranks: cut the model into as many stages as there are "
                "ranks"
            )
        _refuse_ignored(config)
        self.config = config
        self._retained_chunks = int(config.retained_chunks) if retained_chunks is None else retained_chunks
        self.stage = ModelStage(model, config, stages[self.rank]).to(device)
        self.group = group
        self.replicas = None if replicas is None else replicas.get_group()
        if self.replicas is not None:  # new adapters are drawn on each rank
            for parameter in (p for p in self.stage.parameters() if p.requires_grad):
                distributed.broadcast(parameter.data, group_src=0, group=self.replicas)
        if shards_weights and replicas is None:
            raise ValueError("shards_weights=True without replicas: nobody is there to share them with")
        self.shards = None
        if shards_weights and replicas is not None:
            self.shards = StageShards(model, self.stage.layers, replicas)
        self._forwards_ahead = forwards_ahead

    def schedule(self, runs: Sequence[Run]) -> PipelineSchedule:
        return schedule_1f1b(
            [run.num_chunks for run in runs],
            num_stages=distributed.get_world_size(self.group),
            retained_chunks=self._retained_chunks,
            forwards_ahead=self._forwards_ahead,
        )

    def step(self, samples: Sequence[Sample]) -> Tensor:
        """Forward and backward of one optimizer step. Gradients are added to those of the stage's parameters.

        Args:
            samples: The same on all ranks of the pipeline: `input_ids` and, unless all tokens are supervised,
                `labels`.

        Returns:
            The mean loss of the supervised tokens, those of other replicas included, on every rank.
        """
        runs = self.runs([len(sample["input_ids"]) for sample in samples])
        schedule = self.schedule(runs)
        earlier = self._take_grads()
        if self.shards is None:
            loss = self._run(samples, runs, schedule)
        else:
            try:
                self.shards.gather()
                loss = self._run(samples, runs, schedule)
                self.shards.reduce()
            finally:
                self.shards.release()
        for parameter, grad in earlier.items():
            parameter.grad = grad if parameter.grad is None else parameter.grad + grad
        return loss

    def _run(self, samples: Sequence[Sample], runs: Sequence[Run], schedule: PipelineSchedule) -> Tensor:
        """Forward and backward; the parameters are whole."""
        device = next(self.stage.parameters()).device
        self.stage.begin_step()
        cells = self.cells(samples, runs, schedule)
        if self.replicas is not None:
            distributed.all_reduce(cells.num_items, group=self.replicas)
        count = len(schedule.micro_batches)
        hidden = torch.empty(
            (1, int(self.config.chunk_size), self.stage.hidden_size),
            dtype=self.stage.hidden_dtype,
            device="meta",
            requires_grad=True,  # else torch sends no gradient
        )
        indices = torch.arange(count)
        stage = LazyBufferStage(
            cells,
            self.rank,
            schedule.num_stages,
            device,
            input_args=indices[:1] if self.stage.is_first else hidden,
            output_args=torch.empty((), requires_grad=True) if self.stage.is_last else hidden,
            group=self.group,
        )
        runtime = _PipelineScheduleRuntime([stage], count, loss_fn=_placeholder, scale_grads=False)
        runtime._prepare_schedule_with_comms(
            {rank: [_Action.from_str(name) for name in row] for rank, row in enumerate(schedule.rows())}
        )
        args = (indices,) if self.stage.is_first else ()
        try:
            runtime.step(*args, index=indices, target=indices, return_outputs=False)
        except RuntimeError as error:
            if type(error) is RuntimeError and error.__cause__ is not None:  # torch wraps what a stage raises
                raise error.__cause__ from error.__cause__.__cause__
            raise
        self._add_tied_grads()
        self._reduce_grads()
        return self._loss(device)

    def cells(self, samples: Sequence[Sample], runs: Sequence[Run], schedule: PipelineSchedule) -> StageCells:
        """The micro-batches of this stage. Their losses are parts of the mean over the supervised tokens of
        `samples`."""
        device = next(self.stage.parameters()).device
        inputs = [inputs_of(run, [samples[index] for index in run.sequences], device) for run in runs]
        return StageCells(self.stage, self.rank, schedule, runs, inputs)

    def runs(self, lengths: Sequence[int]) -> tuple[Run, ...]:
        """The schedule of sequences of so many tokens.

        Raises:
            UnsupportedModelError: the model's positions would depend on how the tokens are passed.
        """
        runs = pack_runs(lengths, int(self.config.chunk_size), shares_chunks=not self.stage.has_state)
        # A chunk is called by itself, as a segment is; what fills it up is a segment, too.
        refuse_segments(self.stage.model, max(*lengths, *(run.num_empty for run in runs)))
        return runs

    def _take_grads(self) -> dict[nn.Parameter, Tensor]:
        """Sets gradients of earlier steps aside: what is summed over ranks at a step's end is its own."""
        found = {p: p.grad for p in self.stage.parameters() if p.grad is not None}
        for parameter in found:
            parameter.grad = None
        return found

    def _loss(self, device: torch.device) -> Tensor:
        losses = self.stage.losses
        total = torch.stack(losses).sum() if losses else torch.zeros((), device=device)
        total = total.float()
        last = distributed.get_world_size(self.group) - 1
        distributed.broadcast(total, group_src=last, group=self.group)
        if self.replicas is not None:
            distributed.all_reduce(total, group=self.replicas)
        return total

    def _reduce_grads(self) -> None:
        """Sums gradients over the replicas, of the parameters that have one on any of them; where they share
        weights, FSDP2 does, and here they are made to have gradients of the same parameters."""
        if self.replicas is None:
            return
        parameters = [p for p in self.stage.parameters() if p.requires_grad]
        if not parameters:  # the same on all replicas
            return
        device = parameters[0].device
        used = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8, device=device)
        distributed.all_reduce(used, op=distributed.ReduceOp.MAX, group=self.replicas)
        works = []
        for parameter in (p for p, is_used in zip(parameters, used.tolist(), strict=True) if is_used):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if self.shards is None:
                works.append(distributed.all_reduce(parameter.grad, group=self.replicas, async_op=True))
        for work in works:
            work.wait()

    def _add_tied_grads(self) -> None:
        """Embeddings and head are one parameter, of which the first and the last stage have a copy each."""
        if not self.stage.is_tied or self.stage.is_first == self.stage.is_last:
            return
        model = self.stage.model
        owner: Any = model.get_input_embeddings() if self.stage.is_first else model.get_output_embeddings()
        parameter: nn.Parameter = owner.weight
        if not parameter.requires_grad:
            return
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        other = distributed.get_world_size(self.group) - 1 - self.rank
        theirs = torch.empty_like(grad)
        operations = [
            distributed.P2POp(distributed.isend, grad, group=self.group, group_peer=other),
            distributed.P2POp(distributed.irecv, theirs, group=self.group, group_peer=other),
        ]
        for work in distributed.batch_isend_irecv(operations):
            work.wait()
        parameter.grad = grad + theirs


class StageCells(nn.Module):
    """What torch calls with a micro-batch's number: makes its cell, and runs it."""

    def __init__(
        self,
        stage: ModelStage,
        number: int,
        schedule: PipelineSchedule,
        runs: Sequence[Run],
        inputs: Sequence[dict[str, Tensor]],
    ) -> None:
        super().__init__()
        self.stage = stage
        self._number = number
        self._schedule = schedule
        self._runs = runs
        self._last = schedule.stages[0][-1].micro_batch
        self._inputs = inputs
        self.num_items = torch.stack([(own["shift_labels"] != NO_LABEL).sum() for own in inputs]).sum()
        """Supervised tokens, by which losses are divided."""
        self._stores: dict[int, Any] = {}

    def forward(self, received: Tensor, *, index: Tensor) -> Tensor:
        return self.cell(int(index)).run(None if self.stage.is_first else received)

    def cell(self, number: int) -> StageCell:
        """The cell of a micro-batch; they are asked for in their order."""
        run_number, chunk_number, _ = self._schedule.micro_batches[number]
        run = self._runs[run_number]
        stream = stream_of([*run.lengths, run.num_empty], run.chunk_size)
        chunk = stream.chunks[chunk_number]
        if chunk_number == 0:
            self._stores[run_number] = self.stage.new_stores(Chunk(0, stream.num_tokens))
        stores = self._stores[run_number]
        if chunk_number == run.num_chunks - 1:
            del self._stores[run_number]  # from here on, the run's cells keep them
        own = {name: x[:, chunk.start : chunk.end] for name, x in self._inputs[run_number].items()}
        return StageCell(
            stage=self.stage,
            number=number,
            chunk=chunk,
            stream=stream,
            stores=stores,
            model_inputs={**own, "num_items": self.num_items.clamp(min=1)},
            retained=self._schedule.is_retained(self._number, number),
            is_last_backward=number == self._last,
        )


def _refuse_ignored(config: ChunkConfig) -> None:
    """Raises on what is set and a pipeline does not do."""
    for name in ("chunk_size", "retained_chunks"):
        if getattr(config, name) == "auto":
            raise ValueError(
                f"{name}='auto', but a pipeline has no choice of its own: write a number, or let "
                "chunkdist.pipeline.plan.choose_pipeline choose"
            )
    given = {
        "sampler": (config.sampler is not None, "a pipeline backpropagates every chunk: write None"),
        "layers_per_group": (config.layers_per_group not in (1, "all"), "a stage is one group: write 'all'"),
        "offload": (config.offload != "none", "a stage keeps K/V and inputs on its device: write 'none'"),
        "rebuild_kv": (config.rebuild_kv is True, "a stage keeps K/V from the forward: write 'auto'"),
    }
    for name, (is_set, instead) in given.items():
        if is_set:
            raise ValueError(f"{name}={getattr(config, name)!r}, but {instead}")


def inputs_of(run: Run, samples: Sequence[Sample], device: torch.device) -> dict[str, Tensor]:
    """Inputs of a run, (1, T) each, filled up to whole chunks by a sequence of its own, without labels."""
    joined = join_sequences(samples)
    labels = F.pad(joined["labels"], (0, run.num_empty), value=NO_LABEL)
    inputs = {
        "input_ids": F.pad(joined["input_ids"], (0, run.num_empty)),
        "position_ids": torch.cat([joined["position_ids"], torch.arange(run.num_empty)[None]], dim=1),
        "shift_labels": F.pad(labels, (0, 1), value=NO_LABEL)[:, 1:],
    }
    return {name: x.to(device) for name, x in inputs.items()}


def _placeholder(output: Tensor, target: Tensor) -> Tensor:
    """The last stage computes its losses in the backward: what comes out of its forward only starts it."""
    return output
