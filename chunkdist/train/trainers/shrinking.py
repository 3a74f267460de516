"""`oom: shrink`: a step that runs out of memory is tried again with smaller chunks, on all ranks alike."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed
from trl import SFTTrainer

from chunkdist.chunking import chunk_report, reschedule
from chunkdist.loss.by_position import PositionSums
from chunkdist.recovery import recovering
from chunkdist.train.launch.output import print_once
from chunkdist.train.reports.callback import ChunkCallback
from chunkdist.train.reports.token_counter import TokenCounter

if TYPE_CHECKING:
    pass

SMALLEST = 64
"""Tokens of a chunk; with fewer, a cell is no longer what takes the memory."""


class ShrinkingTrainer(SFTTrainer):
    """`SFTTrainer` whose steps run again, with chunks of half the size and none retained, where a rank has
    run out of memory in a layer group or in the loss. The optimizer has not stepped then, and gradients of
    the micro-batches before are computed again too: nothing is lost, and gradients are exact at any size."""

    def __init__(self, **kwargs: Any) -> None:
        self._done: list[dict[str, Any]] = []
        """Micro-batches of the optimizer step at hand."""
        self._error: RuntimeError | None = None
        super().__init__(**kwargs)

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        todo = [inputs]
        while True:
            failed = 0
            for number, one in enumerate(todo, start=1):
                before = copy.deepcopy(self._metrics), self._total_train_tokens
                counters = [(counter, counter.sums) for counter in self._sums()]
                with nullcontext() if number == len(todo) else self.accelerator.no_sync(model=model):
                    loss, failed = self._attempt(model, one, num_items_in_batch)
                if failed or number < len(todo):  # noted already, or not to be
                    self._metrics, self._total_train_tokens = before
                    for counter, sums in counters:
                        counter.sums = sums
                if failed:
                    break
            if not failed:
                break
            self._shrink(failed)
            model.zero_grad(set_to_none=True)
            todo = [*self._done, inputs]
        self._done = [] if self.accelerator.sync_gradients else [*self._done, inputs]
        return loss

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._done = []  # a run that failed may have left some
        return super().train(*args, **kwargs)

    def _sums(self) -> list[TokenCounter | PositionSums]:
        """What has been counted of the steps."""
        found: list[TokenCounter | PositionSums] = []
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ChunkCallback):
                found += [] if callback.counter is None else [callback.counter]
                found += [] if callback.positions is None else [callback.positions.training]
        return found

    def _attempt(
        self, model: Any, inputs: dict[str, Any], num_items: Tensor | int | None
    ) -> tuple[Tensor, int]:
        """The loss, and how many ranks have run out of memory."""
        with recovering() as recovery:
            loss = super().training_step(model, dict(inputs), num_items)  # type: ignore[no-untyped-call]
        failed = torch.tensor(int(recovery.error is not None), device=loss.device)
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(failed)
        self._error = recovery.error
        return loss, int(failed)

    def _shrink(self, num_failed: int) -> None:
        """Half the chunk size, on all ranks.

        Raises:
            RuntimeError: chunks are as small as they get; the first one that was caught.
        """
        assert self.model is not None
        before = chunk_report(self.model).chunk_size
        told = f"out of memory on {num_failed} rank(s) in step {self.state.global_step + 1}"
        if before // 2 < SMALLEST:
            raise self._error or torch.OutOfMemoryError(f"{told}, with chunks of {before} tokens")
        reschedule(self.model, chunk_size=before // 2, reason=f"as configured, and halved: {told}")
        print_once(f"{told}: chunk_size {before} -> {before // 2}, and the step runs again")
