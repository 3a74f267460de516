"""`chunkdist plan` of a pipeline: what the launcher would choose, on the config's data, for a card."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from chunkdist.cli.plan_options import PlanOptions
from chunkdist.config import ChunkConfig
from chunkdist.data.pipeline_batches import PipelineBatchSampler
from chunkdist.data.samples import sample_lengths
from chunkdist.memory.planner import usable_bytes
from chunkdist.train.build import build_trainer
from chunkdist.train.options.arguments import TrainingOptions
from chunkdist.train.pipeline_plan import PipelineQuestion


def run_pipeline_plan(
    options: TrainingOptions, config: ChunkConfig, model: Any, asked: PlanOptions, console: Console
) -> int:
    """Prints the plan of one replica, and what each stage does in its first step; returns 0.

    Raises:
        ValueError: something is asked for that a pipeline's plan does not have.
    """
    for name, is_set in (
        ("--engine", asked.engine not in (None, "single")),
        ("--deepspeed", asked.deepspeed is not None),
        ("--accelerate", asked.accelerate is not None),
        ("--length", asked.length is not None),
        ("--simulate", asked.simulate),
    ):
        if is_set:
            raise ValueError(
                f"{name} with pipeline_stages={options.training.pipeline_stages}: a pipeline is planned for "
                f"one replica, on the config's data; leave {name} out"
            )
    stages = options.training.pipeline_stages
    lengths = _lengths(options)
    batches = PipelineBatchSampler(
        lengths,
        batch_sequences=options.training.per_device_train_batch_size * stages,
        num_replicas=1,
        replica=0,
        seed=options.training.seed if options.training.data_seed is None else options.training.data_seed,
        shuffle=str(options.training.train_sampling_strategy) == "random",
    )
    steps = [[lengths[index] for index in batch] for (batch,) in batches]
    question = PipelineQuestion(model, config, steps, max(lengths), options.training, "cuda")
    room = question.room(usable_bytes(asked.planned_card.memory_bytes)) if question.asked else None
    plan = question.answer(room)
    console.print(question.table(plan, room, num_replicas=1))
    console.print(question.timeline(plan).table())
    return 0


def _lengths(options: TrainingOptions) -> list[int]:
    """Tokens of each training sample. Nobody trains, so one process will do."""
    training = options.training
    stages, training.pipeline_stages = training.pipeline_stages, 1
    ahead, training.pipeline_forwards_ahead = training.pipeline_forwards_ahead, "1"
    shard, training.pipeline_shard_weights = training.pipeline_shard_weights, False
    try:
        trainer, _ = build_trainer(options, has_weights=False)
    finally:
        training.pipeline_stages, training.pipeline_forwards_ahead = stages, ahead
        training.pipeline_shard_weights = shard
    return sample_lengths(trainer.train_dataset)
