"""Options against amounts: what they leave of the data, and whether chunks cut anything."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from chunkdist.models.extend import context_length

if TYPE_CHECKING:
    from trl import SFTTrainer

    from chunkdist.config import ChunkConfig
    from chunkdist.train.options.arguments import TrainingOptions


def check_amounts(trainer: SFTTrainer) -> None:
    """Refuses a `dataloader_drop_last` that drops all samples.

    Raises:
        ValueError: says how many samples there are, and how many a batch of all ranks needs.
    """
    args: Any = trainer.args
    if not args.dataloader_drop_last or hasattr(trainer, "stream_sampler"):
        return
    replicas = trainer.accelerator.num_processes // getattr(args, "pipeline_stages", 1)
    for name, dataset, rows, option in (
        ("train", trainer.train_dataset, args.train_batch_size, "per_device_train_batch_size"),
        ("eval", trainer.eval_dataset, args.eval_batch_size, "per_device_eval_batch_size"),
    ):
        samples: Any = dataset
        if hasattr(samples, "__len__") and len(samples) < rows * replicas:
            raise ValueError(
                f"dataloader_drop_last=True drops all {len(samples)} samples of the {name} data, a batch of "
                f"{replicas} rank(s) has {rows * replicas}: write dataloader_drop_last: false, or a smaller "
                f"{option}"
            )


def chunk_size_line(options: TrainingOptions, config: ChunkConfig | None) -> str | None:
    """A line where a chunk is longer than all that is cut into chunks."""
    training = options.training
    if config is None or training.max_length is None or options.chunk.chunk_packing:
        return None
    joined = training.packing or training.padding_free
    longest = training.max_length * (training.per_device_train_batch_size if joined else 1)
    if not isinstance(config.chunk_size, int) or config.chunk_size <= longest:
        return None
    return (
        f"chunk_size={config.chunk_size} is above max_length={training.max_length}: every row is one chunk, "
        "and chunks save nothing; a smaller chunk_size would"
    )


def context_line(options: TrainingOptions, model: Any) -> str | None:
    """A line where rows are longer than the sequences that the model was made for, or set up for."""
    longest, length = options.training.max_length, context_length(model)
    if longest is None or length is None or longest <= length:
        return None
    asked = options.model.context_length
    made = f"context_length={asked}" if asked else f"what the model was made for, {length:,} tokens"
    return (
        f"warning: max_length={longest} is above {made}: positions behind that are new to it, and tokens "
        f"there are predicted badly until it has learnt them; write context_length: {longest}"
    )
