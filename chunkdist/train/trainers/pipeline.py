"""Training in a pipeline: the parts of `SFTTrainer` that know about ranks, batches and files.

Ranks stand in rows: replica r of S stages is ranks r S to r S + S - 1. A global batch is
`per_device_train_batch_size` x ranks sequences, as anywhere else; each replica gets its share of it, all
ranks of a replica the same, and an optimizer step is one step of the pipeline. The model is whole on every
rank, in host memory, until training begins; then each keeps its stage, and only that goes to its device.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.data_loader import DataLoaderShard  # type: ignore[import-untyped]
from peft import PeftModel
from rich.console import Console
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_utils import EvalLoopOutput, seed_worker

from chunkdist.config import ChunkConfig
from chunkdist.data.pipeline_batches import PipelineBatchSampler, PipelineTokens
from chunkdist.data.samples import sample_lengths
from chunkdist.data.streams import NO_LABEL
from chunkdist.loss.token_losses import TokenLosses
from chunkdist.models.flops import StepFlops
from chunkdist.models.layers import causal_lm_of
from chunkdist.pipeline.collective import clip_grad_norm, evaluate, local_part, whole_state_dict
from chunkdist.pipeline.plan import PipelinePlan
from chunkdist.pipeline.step import Pipeline
from chunkdist.train.pipeline_plan import MOST_BATCHES, PipelineQuestion, least_room
from chunkdist.train.samples.stream_order import StreamOrder
from chunkdist.train.trainers.checked import CheckedSFTTrainer
from chunkdist.train.trainers.streams import StreamSamples

if TYPE_CHECKING:
    from datasets import Dataset

Samples = list[dict[str, Any]]
_NOTHING: dict[str, Any] = {"input_ids": [0, 0], "labels": [NO_LABEL, NO_LABEL]}
"""What a replica runs where the last batch of an epoch has fewer sequences than there are replicas."""


class PipelineSFTTrainer(CheckedSFTTrainer):
    """`CheckedSFTTrainer` whose ranks are the stages of pipelines."""

    def __init__(self, *, chunk_config: ChunkConfig, **kwargs: Any) -> None:
        self._chunk_config = chunk_config
        self._pipeline: Pipeline | None = None
        super().__init__(**kwargs)
        if self.aux_loss_enabled:
            raise ValueError(
                f"the router's balance loss (router_aux_loss_coef: {self.router_aux_loss_coef:g}) with "
                "pipeline_stages above 1: a stage hands out no router logits; write router_aux_loss_coef: 0, "
                "or pipeline_stages: 1"
            )
        _refuse_tied_copies(self.model)
        args: Any = self.args
        self._num_replicas = args.world_size // args.pipeline_stages
        self._replica, self._stage = divmod(args.process_index, args.pipeline_stages)
        self.tokens = PipelineTokens(StepFlops.of(self.model)) if self.model is not None else None
        sampling = str(args.train_sampling_strategy)
        self.order = StreamOrder(
            batch_sequences=self.get_total_train_batch_size(args),
            num_samples=len(sample_lengths(self.train_dataset)),
            seed=args.seed if args.data_seed is None else args.data_seed,
            sampling=sampling,
        )
        self._plan = self._choose(chunk_config)
        self._chunk_config = replace(
            chunk_config, chunk_size=self._plan.chunk_size, retained_chunks=max(self._plan.retained_chunks)
        )
        self.order.values["pipeline"] = [
            [len(layers) for layers in self._plan.stages],
            self._num_replicas,
            args.pipeline_shard_weights,
        ]
        self.add_callback(self.order)

    def _choose(self, config: ChunkConfig) -> PipelinePlan:
        """Chosen by the first batches of the first replica, and so alike on all ranks. Collective."""
        args: Any = self.args
        lengths = sample_lengths(self.train_dataset)
        first = islice(self._batches(replica=0), MOST_BATCHES)
        batches = [[lengths[index] for index in batch] for (batch,) in first if batch]
        question = PipelineQuestion(self.model, config, batches, max(lengths), args, args.device.type)
        room = least_room(question, args.device)
        plan = question.answer(room)
        if self.is_world_process_zero():
            console = Console(width=None if sys.stdout.isatty() else 110)
            console.print(question.table(plan, room, num_replicas=self._num_replicas))
        return plan

    def role_of(self, rank: int) -> str:
        """For messages."""
        replica, stage = divmod(rank, int(self.args.pipeline_stages))  # type: ignore[attr-defined]
        return f" (stage {stage} of replica {replica})"

    @property
    def pipeline(self) -> Pipeline:
        """This rank's stage; the first call lets go of what others have. Collective."""
        if self._pipeline is None:
            args: Any = self.args
            stages, replicas = args.pipeline_stages, self._num_replicas
            timeout = args.ddp_timeout_delta  # no default of torch for new groups
            rows = [range(r * stages, (r + 1) * stages) for r in range(replicas)]
            columns = [range(stage, stages * replicas, stages) for stage in range(stages)]
            groups = [distributed.new_group(list(ranks), timeout=timeout) for ranks in (*rows, *columns)]
            of_stage: Any = groups[replicas + self._stage]
            self._pipeline = Pipeline(
                causal_lm_of(self.model),
                self._chunk_config,
                self._plan.stages,
                group=groups[self._replica],
                replicas=DeviceMesh.from_group(of_stage, args.device.type) if replicas > 1 else None,
                shards_weights=args.pipeline_shard_weights,
                device=args.device,
                retained_chunks=self._plan.retained_chunks,
                forwards_ahead=self._plan.forwards_ahead,
            )
        return self._pipeline

    def observe_losses(self, observe: Callable[[TokenLosses], None]) -> Callable[[], None]:
        """As `chunkdist.chunking.observe_losses`; only the last stage has any. Collective."""
        observers = self.pipeline.stage.observers
        observers.append(observe)
        return lambda: observers.remove(observe)

    def _move_model_to_device(self, model: Any, device: torch.device) -> None:
        """No device holds the whole model: `pipeline` moves the stage."""

    def get_train_dataloader(self) -> DataLoader[Any]:
        """All ranks of a replica get the same."""
        return self._loader(self.train_dataset, self._batches(self._replica))

    def _batches(self, replica: int) -> PipelineBatchSampler:
        values = self.order.values
        return PipelineBatchSampler(
            sample_lengths(self.train_dataset),
            batch_sequences=values["batch_sequences"],
            num_replicas=self._num_replicas,
            replica=replica,
            seed=values["seed"],
            shuffle=values["sampling"] == "random",
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        dataset: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        size, count = int(self.args.per_device_eval_batch_size), len(dataset)
        batches = [tuple(range(start, min(start + size, count))) for start in range(0, count, size)]
        return self._loader(dataset, [[batch] for batch in batches[self._replica :: self._num_replicas]])

    def _loader(self, dataset: Dataset, sampler: Any) -> DataLoader[Any]:
        args = self.args
        loader: DataLoader[Any] = DataLoaderShard(
            StreamSamples(dataset),
            batch_sampler=sampler,
            collate_fn=_only,
            num_workers=args.dataloader_num_workers,
            worker_init_fn=partial(
                seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index
            ),
        )
        return loader

    def get_batch_samples(
        self, epoch_iterator: Iterator[Samples], num_batches: int, device: torch.device
    ) -> tuple[list[Samples], None]:
        """The pipeline counts the supervised tokens itself."""
        return list(islice(epoch_iterator, num_batches)), None

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of the whole batch. The loss is that of all replicas, on every rank."""
        model.train()
        samples = inputs or [_NOTHING]
        with self.accelerator.autocast():
            loss = self.pipeline.step(samples)
        if self._stage == 0 and self.tokens is not None:
            self.tokens.add([len(sample["input_ids"]) for sample in inputs])
        return loss.detach()

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The loss alone."""
        samples: Any = dataloader.dataset
        with self.accelerator.autocast():
            loss = evaluate(self.pipeline, list(dataloader))
        return EvalLoopOutput(
            predictions=None,  # type: ignore[arg-type]
            label_ids=None,
            metrics={f"{metric_key_prefix}_loss": loss},
            num_samples=len(samples),
        )

    def floating_point_ops(self, inputs: Any) -> int:
        """This stage's layers."""
        return int(super().floating_point_ops(_tokens(inputs)))

    def _track_num_input_tokens(self, inputs: Samples) -> None:
        super()._track_num_input_tokens(_tokens(inputs if self._stage == 0 else []))  # type: ignore[no-untyped-call]

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """The optimizer is made of the parameters of this rank's stage."""
        assert self.pipeline.stage is not None
        return super()._prepare_for_training(*args, **kwargs)  # type: ignore[no-untyped-call]

    def _wrap_model(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        return self.pipeline.stage

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        return clip_grad_norm(self.pipeline, self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | None = None) -> Tensor:
        return clip_grad_norm(self.pipeline, float("inf")) if grad_norm is None else grad_norm

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The whole model, by rank 0. Collective."""
        assert self.model is not None
        whole = whole_state_dict(self.pipeline, self.model)
        if self.args.should_save:
            self._save(output_dir or self.args.output_dir, state_dict=whole)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Each rank its own."""
        assert self.optimizer is not None
        assert self.lr_scheduler is not None
        os.makedirs(output_dir, exist_ok=True)
        state = self.optimizer.state_dict()
        local = {
            number: {name: local_part(x) for name, x in values.items()}
            for number, values in state["state"].items()
        }
        torch.save({**state, "state": local}, self._optimizer_file(output_dir))
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        assert self.optimizer is not None
        assert self.lr_scheduler is not None
        state = torch.load(self._optimizer_file(checkpoint), map_location="cpu", weights_only=True)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        numbers = [number for group in state["param_groups"] for number in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            values = state["state"].get(number, {})
            values.update({name: _like(x, parameter) for name, x in values.items()})
        self.optimizer.load_state_dict(state)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    def _optimizer_file(self, folder: str) -> Path:
        return Path(folder) / f"optimizer_rank{self.args.process_index}.pt"


def _only(items: list[Samples]) -> Samples:
    (samples,) = items
    return samples


def _tokens(samples: Samples) -> dict[str, Tensor]:
    ids = torch.tensor([token for sample in samples for token in sample["input_ids"]], dtype=torch.long)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _like(x: Any, parameter: Tensor) -> Any:
    """A rank's part of an optimizer's state, as the parameter's other parts expect it."""
    if not isinstance(parameter, DTensor) or not isinstance(x, Tensor) or x.ndim == 0:
        return x
    own = x.to(parameter.to_local().device)
    return DTensor.from_local(
        own,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def _refuse_tied_copies(model: Any) -> None:
    """PEFT saves tied modules that it trains whole under both names, and a stage has only one of them.

    Raises:
        ValueError: the adapters could not be loaded again.
    """
    if not isinstance(model, PeftModel):
        return
    base = causal_lm_of(model)
    tied = base.config.get_text_config(decoder=True).tie_word_embeddings
    if tied and hasattr(base.get_output_embeddings(), "modules_to_save"):
        raise ValueError(
            "lora_modules_to_save has the output layer, which is tied to the embeddings: with stages, "
            "adapters could not be loaded again; leave embeddings and output layer out of it"
        )
