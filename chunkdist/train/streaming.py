"""Samples that stream into a trainer: what that excludes, and how they are prepared."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from chunkdist.data.sample_stream import SampleStream, StreamFit
from chunkdist.errors import BadSampleError

if TYPE_CHECKING:
    from datasets import IterableDataset

    from chunkdist.train.options import TrainingOptions

WHY = "a stream has no length and is read in its own order"


def wants_streaming(options: TrainingOptions) -> bool:
    """Whether the option that belongs to the kind of dataset is set."""
    return bool(options.data.dataset_streaming if options.data.dataset_name else options.mixture.streaming)


def check_streaming(options: TrainingOptions) -> None:
    """Refuses what cannot be done with samples that stream.

    Raises:
        ValueError: says what to write instead.
    """
    data, mixture, training = options.data, options.mixture, options.training
    if data.dataset_name and mixture.streaming:
        raise ValueError(
            "streaming=True is an option of datasets, not of dataset_name: write dataset_streaming"
        )
    if mixture.datasets and data.dataset_streaming:
        raise ValueError(
            "dataset_streaming=True is an option of dataset_name, not of datasets: write streaming"
        )
    if not wants_streaming(options):
        return
    set_by = "dataset_streaming" if data.dataset_name else "streaming"
    if training.max_steps <= 0:
        raise ValueError(
            f"{set_by}=True without max_steps: a stream does not say how long it is; write max_steps"
        )
    refused = {
        "chunk_packing": (
            options.chunk.chunk_packing,
            "write packing: true for TRL's, or chunk_packing: false",
        ),
        "pipeline_stages": (training.pipeline_stages > 1, f"write 1, or {set_by}: false"),
        "train_sampling_strategy": (
            training.train_sampling_strategy not in ("random", "sequential"),
            "leave it out, or write shuffle_dataset: true to mix what is read ahead",
        ),
        "dataloader_num_workers": (
            training.dataloader_num_workers > 1,
            "one process reads it; write 1 (beside the training) or 0",
        ),
        "test_split_size": (mixture.test_split_size is not None, f"write {set_by}: false"),
    }
    for name, (is_set, instead) in refused.items():
        if is_set:
            parts: tuple[Any, ...] = (options.chunk, training, mixture)
            value = next(getattr(part, name) for part in parts if hasattr(part, name))
            raise ValueError(f"{name}={value} with {set_by}=True: {WHY}; {instead}")


def prepare_stream(
    samples: IterableDataset, fit: StreamFit, prepare: Callable[[IterableDataset, bool], Any], *, name: str
) -> SampleStream:
    """TRL's preparation in two parts, as for a whole dataset, each sample being looked at between them.

    Args:
        prepare: TRL's, of the samples; its second argument: whether they are tokenised already.
    """
    fitting = fit.fitted(prepare(samples, False))
    if next(iter(fitting), None) is None:
        raise BadSampleError(f"{name}: long_samples=drop leaves no sample: raise max_length")
    return SampleStream(prepare(fitting, True), repeats=name.startswith("train"))
