"""Ranks that share the tokens of rows (`sequence_parallel_size`): a group gets the same samples, each rank
its part of them. To all else in a trainer, ranks are data-parallel ones with short rows.

Evaluated are whole rows, other ones on each rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.data import DataLoader
from trl import SFTTrainer

from chunkdist.data.row_parts import PartCollator, RowParts


class SharedRowsTrainer(SFTTrainer):
    """`SFTTrainer` with an option more; without it, as it was."""

    @property
    def row_parts(self) -> RowParts:
        """Which part of its rows this rank has."""
        size = int(getattr(self.args, "sequence_parallel_size", 1))
        return RowParts(num_ranks=size, rank=self.accelerator.process_index % size)

    @property
    def num_replicas(self) -> int:
        """How many sequence groups there are; each gets samples of its own."""
        return int(self.accelerator.num_processes) // self.row_parts.num_ranks

    @property
    def replica(self) -> int:
        """Which of them this rank is in."""
        return int(self.accelerator.process_index) // self.row_parts.num_ranks

    def get_total_train_batch_size(self, args: Any) -> int:
        """Sequences of an optimizer step."""
        return int(super().get_total_train_batch_size(args)) // self.row_parts.num_ranks

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The samples of this rank's group, cut to its part."""
        if self.row_parts.num_ranks == 1:
            return super().get_train_dataloader()
        whole, self.data_collator = self.data_collator, PartCollator(self.data_collator, self.row_parts)
        try:
            with self._sampling_by_replica():
                return super().get_train_dataloader()
        finally:
            self.data_collator = whole

    @contextmanager
    def _sampling_by_replica(self) -> Iterator[None]:
        """Inside, a data loader that Accelerate prepares is for one of the groups, not of the ranks."""
        accelerator, state = self.accelerator, self.accelerator.state
        prepare = accelerator.prepare_data_loader

        def prepared(*args: Any, **kwargs: Any) -> Any:
            before = state.num_processes, state.process_index
            state.num_processes, state.process_index = self.num_replicas, self.replica
            try:
                return prepare(*args, **kwargs)
            finally:
                state.num_processes, state.process_index = before

        accelerator.prepare_data_loader = prepared
        try:
            yield
        finally:
            del accelerator.prepare_data_loader
