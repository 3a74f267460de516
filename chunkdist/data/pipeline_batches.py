"""Which sequences each replica of a pipeline gets, and the count of what it got."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch.utils.data import BatchSampler

from chunkdist.data.sampler import shuffled
from chunkdist.models.flops import StepFlops, num_pairs


class PipelineBatchSampler(BatchSampler):
    """Global batches of an epoch; yields the share of one replica, as one index of `StreamSamples`.

    The longest sequences are dealt out first, and shuffled epochs begin with the longest. What is
    yielded follows from the epoch alone.
    """

    batch_size = 1  # accelerate: an item is whole, none is cut to even out the last one
    drop_last = False

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        batch_sequences: int,
        num_replicas: int,
        replica: int,
        seed: int,
        shuffle: bool,
    ) -> None:
        self._lengths = list(lengths)
        self._batch_sequences = batch_sequences
        self._num_replicas, self._replica = num_replicas, replica
        self._seed, self._shuffle, self._epoch = seed, shuffle, 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return -(-len(self._lengths) // self._batch_sequences)

    def __iter__(self) -> Iterator[list[tuple[int, ...]]]:  # type: ignore[override]  # indices of one batch
        order = list(range(len(self._lengths)))
        if self._shuffle:
            order = shuffled(self._lengths, self._seed + self._epoch, longest_first=True)
        for start in range(0, len(order), self._batch_sequences):
            batch = order[start : start + self._batch_sequences]
            batch.sort(key=lambda index: (-self._lengths[index], index))
            yield [tuple(batch[self._replica :: self._num_replicas])]


class PipelineTokens:
    """What `TokenCounter` counts, told by the trainer: a stage's decoder is called once a cell."""

    def __init__(self, flops: StepFlops) -> None:
        self.flops = flops
        self._sums = [0] * (1 + len(flops.per_pair))

    def add(self, lengths: Sequence[int]) -> None:
        windows = [window for window, _ in self.flops.per_pair]
        counts = [sum(lengths), *(sum(num_pairs(length, window) for length in lengths) for window in windows)]
        self._sums = [total + own for total, own in zip(self._sums, counts, strict=True)]

    def take(self) -> list[int]:
        """The counts since the last call."""
        sums, self._sums = self._sums, [0] * len(self._sums)
        return sums

    def remove(self) -> None:
        """There is no hook to be removed."""
