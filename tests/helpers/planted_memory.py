"""Too little memory, planted: what runs more tokens at a time than a limit allows finds none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal
from unittest import mock

import torch

from chunkdist.engine.group import GroupCall
from chunkdist.loss import lazy_logits

Place = Literal["forward", "backward", "loss"]


@contextmanager
def memory_for(num_tokens: int, place: Place, group: int = 1) -> Iterator[list[int]]:
    """Inside, longer chunks of one group find too little memory, or, in the loss, all tokens do once.

    Args:
        group: Counted from the top.

    Yields:
        The numbers of tokens that did not fit.
    """
    refused: list[int] = []
    run_layers, loss = GroupCall._run_layers, lazy_logits.linear_cross_entropy

    def limited(run: Any, chunk: Any, hidden: Any, **kwargs: Any) -> Any:
        here = run.group.num_above == group and torch.is_grad_enabled() == (place == "backward")
        if place != "loss" and here and chunk.end - chunk.start > num_tokens:
            refused.append(chunk.end - chunk.start)
            raise torch.OutOfMemoryError("planted: out of memory")
        return run_layers(run, chunk, hidden, **kwargs)

    def limited_loss(hidden: Any, *args: Any, **kwargs: Any) -> Any:
        if place == "loss" and not refused:
            refused.append(hidden.shape[-2])
            raise torch.OutOfMemoryError("planted: out of memory")
        return loss(hidden, *args, **kwargs)

    with (
        mock.patch.object(GroupCall, "_run_layers", limited),
        mock.patch.object(lazy_logits, "linear_cross_entropy", limited_loss),
    ):
        yield refused
