"""Counts what a trainer feeds to a model: the real tokens of each forward, and the pairs that attend to each
other.

A forward pre-hook on the decoder, so that it sees the same batches whatever the trainer, its collator and its
loss do: each micro-batch once, however many chunks it runs as, padding left out, evaluation too. Sums stay on
the device until they are asked for, so that no step waits for them.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from chunkdist.models.flops import StepFlops
from chunkdist.models.layers import causal_lm_of
from chunkdist.stream.positions import positions_in_sequences


class TokenCounter:
    """Counts the training forwards of `model` from construction until `remove`.

    A rank counts its own tokens. Ranks that share a sequence (tensor parallelism) each count all of it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.flops = StepFlops.of(model)
        decoder: nn.Module = causal_lm_of(model).get_decoder()
        self._signature = inspect.signature(decoder.forward)
        self.sums: Tensor | None = None
        """Since the last `take`, on the device."""
        self._hook = decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True, prepend=True)

    def take(self) -> list[int]:
        """The counts since the last call, as `StepFlops.from_counts` wants them; waits for the device."""
        sums, self.sums = self.sums, None
        return (
            [0] * (1 + len(self.flops.per_pair))
            if sums is None
            else [int(number) for number in sums.tolist()]
        )

    def remove(self) -> None:
        self._hook.remove()

    def _before_decoder(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not decoder.training or not torch.is_grad_enabled():
            return
        arguments = self._signature.bind_partial(*args, **kwargs).arguments
        arguments = {**arguments, **arguments.get("kwargs", {})}
        tokens = arguments.get("input_ids")
        tokens = arguments.get("inputs_embeds") if tokens is None else tokens
        if isinstance(tokens, Tensor):
            shape = (tokens.shape[0], tokens.shape[1])
            counts = self.flops.counts(*positions_in_sequences(arguments, shape, tokens.device))
            self.sums = counts if self.sums is None else self.sums + counts
