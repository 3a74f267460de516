"""What a sequence costs to train on: linear in its tokens, and quadratic by its pairs of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from chunkdist.models.flops import StepFlops, num_pairs


@dataclass(frozen=True, kw_only=True)
class SequenceCost:
    """Cost of a sequence in one unit of the caller's choice: FLOPs, seconds.

    Args:
        per_token: Cost of one token.
        per_pair: For each window (`None`: all earlier positions) the cost of one pair of positions that
            attend to each other, of which a sequence of T tokens has T (T + 1) / 2.
    """

    per_token: float
    per_pair: tuple[tuple[int | None, float], ...] = ()

    def __call__(self, length: int, shared: int = 0) -> float:
        """Args:
        shared: Its first tokens that are computed for another sequence anyway.
        """
        pairs = sum(
            cost * (num_pairs(length, window) - num_pairs(shared, window)) for window, cost in self.per_pair
        )
        return self.per_token * (length - shared) + pairs

    @classmethod
    def of(cls, model: nn.Module) -> SequenceCost:
        """FLOPs of a training step, from a model's parameters and config."""
        flops = StepFlops.of(model)
        return cls(per_token=flops.per_token, per_pair=flops.per_pair)

    @classmethod
    def of_config(cls, config: PreTrainedConfig) -> SequenceCost:
        """Costs from a causal LM's config, without its weights."""
        with torch.device("meta"):
            return cls.of(AutoModelForCausalLM.from_config(config))

    @classmethod
    def measured(cls, lengths: Sequence[int], seconds: Sequence[float]) -> SequenceCost:
        """The costs, none negative, that fit measured times best (least squares of relative errors).

        Raises:
            ValueError: fewer than two different lengths, or a time that is not positive.
        """
        if len(lengths) != len(seconds) or len(set(lengths)) < 2 or min(seconds) <= 0 or min(lengths) < 1:
            raise ValueError(
                f"lengths={list(lengths)[:4]}, seconds={list(seconds)[:4]} do not tell a cost: pass as many "
                "positive times as lengths, of at least two different lengths"
            )
        terms = np.array([[length, num_pairs(length)] for length in lengths]) / np.array(seconds)[:, None]
        best, _, _, _ = np.linalg.lstsq(terms, np.ones(len(lengths)), rcond=None)
        if min(best) < 0:  # then one term alone fits best: the other one
            other = int(best.argmin() == 0)
            best = np.zeros(2)
            best[other] = terms[:, other].sum() / (terms[:, other] ** 2).sum()
        return cls(per_token=float(best[0]), per_pair=((None, float(best[1])),))
