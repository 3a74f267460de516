"""Samples that stream into a trainer: what that excludes, and how they are prepared."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from chunkdist.data.sample_stream import SampleStream, StreamFit
from chunkdist.errors import BadSampleError

if TYPE_CHECKING:
    from datasets import IterableDataset


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
