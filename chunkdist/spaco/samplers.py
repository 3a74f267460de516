"""Chunk samplers: which chunks SpaCO backpropagates, and with which weights (arXiv 2505.16710, section 4).

A gradient that enters chunk i is multiplied by a weight w_i, 0 for a dropped chunk. If chunks are kept
independently with probabilities p_i and w_i = 1 / p_i, the factors along every path through chunks are
independent with mean 1, and the estimate of every gradient is exactly unbiased. Random numbers come from
torch's default CPU generator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class ChunkSampler(Protocol):
    """Anything with `draw`."""

    def draw(self, scores: Tensor) -> Tensor:
        """Draws the weights of one sequence's chunks.

        Args:
            scores: (k,), fp64, CPU: the norms of the chunks' output gradients.

        Returns:
            (k,): the weight of each chunk's gradient; 0 drops the chunk. Or (k, k): on the diagonal, the
            weight of each chunk's own output gradient; at [j, i], i < j, that of what chunk j leaves for the
            keys and values of chunk i.
        """
        ...


@dataclass(frozen=True)
class IndependentSampler:
    """Keeps each chunk with the same probability, independently of the others. Unbiased.

    Args:
        budget: Expected number of chunks kept. A sequence of no more chunks is backpropagated whole.
    """

    budget: float = 8
    unbiased: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_budget(self.budget)

    def draw(self, scores: Tensor) -> Tensor:
        return _keep(torch.full_like(scores, min(1.0, self.budget / len(scores)), dtype=torch.float64))


@dataclass(frozen=True)
class ImportanceSampler:
    """Keeps each chunk independently, with a probability in proportion to the norm of its output gradient.
    Unbiased.

    Args:
        budget: Expected number of chunks kept. A sequence of no more chunks is backpropagated whole.
        min_probability: No chunk is kept with a lower one, or than `MIN_SHARE` of budget / k, if that is
            lower: bounds the weights. Where few chunks have a loss, the others share what these leave.
    """

    MIN_SHARE: ClassVar[float] = 0.25
    budget: float = 8
    min_probability: float = 0.05
    unbiased: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_budget(self.budget)
        _check_probability(self.min_probability)

    def draw(self, scores: Tensor) -> Tensor:
        return _keep(self.probabilities(scores))

    def probabilities(self, scores: Tensor) -> Tensor:
        """(k,): min(1, max(floor, c * score)), with c such that they sum to the budget."""
        num_chunks = len(scores)
        if self.budget >= num_chunks:
            return torch.ones(num_chunks, dtype=torch.float64)
        equal = self.budget / num_chunks
        scores = scores.double()
        num_scored = int(scores.count_nonzero())
        if not bool(scores.isfinite().all()) or not num_scored:
            return torch.full_like(scores, equal)
        floor = min(self.min_probability, self.MIN_SHARE * equal)
        if num_scored + floor * (num_chunks - num_scored) <= self.budget:
            rest = (self.budget - num_scored) / max(1, num_chunks - num_scored)
            return torch.full_like(scores, max(rest, floor)).masked_fill(scores > 0, 1)
        scores = torch.where(
            scores > 0, (scores / scores.max()).clamp(min=1e-300), scores
        )  # 1 / score is finite
        low, high = 0.0, 1 / float(scores[scores > 0].min())
        for _ in range(2000):  # the sum grows with c: bisection, to the last bit
            middle = (low + high) / 2
            if middle in (low, high):
                break
            if float((scores * middle).clamp(floor, 1).sum()) < self.budget:
                low = middle
            else:
                high = middle
        return (scores * high).clamp(floor, 1)


@dataclass(frozen=True)
class FixedBudgetSampler:
    """The paper's estimator: t of k chunks without replacement, factor k / t. **Biased**: the factors of two
    chunks on a path depend on each other.

    Args:
        budget: Number of chunks kept, t. A sequence of no more chunks is backpropagated whole.
        cap: Upper bound of the factor (2 in the paper's experiments), which adds a bias; `None`: none.
    """

    budget: int = 8
    cap: float | None = None
    unbiased: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_budget(self.budget)
        if not float(self.budget).is_integer():
            raise ValueError(f"budget={self.budget} is no number of chunks: write an integer")
        if self.cap is not None and not self.cap >= 1:
            raise ValueError(f"cap={self.cap} would shrink every gradient: write a factor >= 1, or None")

    def draw(self, scores: Tensor) -> Tensor:
        num_chunks = len(scores)
        num_kept = min(int(self.budget), num_chunks)
        factor = num_chunks / num_kept
        weights = torch.zeros(num_chunks, dtype=torch.float64)
        weights[torch.randperm(num_chunks)[:num_kept]] = factor if self.cap is None else min(factor, self.cap)
        return weights


@dataclass(frozen=True)
class RunSampler:
    """Keeps neighbouring chunks together: whether chunk i is kept depends on chunk i + 1 alone. Unbiased.

    From the last chunk to the first, kept and dropped form a Markov chain. A path of gradients through chunks
    a > b > c gets the weight 1 / P(a) * 1 / P(b | a) * 1 / P(c | b) = 1 / P(all three are kept), so that its
    mean is right. Near chunks, to which most of attention goes, are mostly kept together, at a low factor.

    Args:
        budget: Expected number of chunks kept. A sequence of no more chunks is backpropagated whole.
        run_length: Mean number of neighbours kept together; below 1 / (1 - budget / k) they come together by
            chance as often: then chunks are independent.
        importance: Whether a chunk's probability is that of `ImportanceSampler`; else all have the same.
        min_probability: As `ImportanceSampler` has it.
    """

    budget: float = 8
    run_length: float = 2
    importance: bool = True
    min_probability: float = 0.05
    unbiased: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_budget(self.budget)
        _check_probability(self.min_probability)
        if not self.run_length >= 1:
            raise ValueError(f"run_length={self.run_length} is less than one chunk: write a number >= 1")

    def draw(self, scores: Tensor) -> Tensor:
        p = self.probabilities(scores).tolist()
        ties = self.ties(p)
        kept: list[bool] = []  # from the last chunk to the first
        for i, u in zip(
            reversed(range(len(p))), torch.rand(len(p), dtype=torch.float64).tolist(), strict=True
        ):
            kept.append(u < (self.probability_after(kept[-1], i, p, ties) if kept else p[i]))
        return self.weights(kept[::-1], p, ties)

    def probabilities(self, scores: Tensor) -> Tensor:
        """(k,): of each chunk to be kept."""
        if self.importance:
            return ImportanceSampler(self.budget, self.min_probability).probabilities(scores)
        return torch.full((len(scores),), min(1.0, self.budget / len(scores)), dtype=torch.float64)

    def ties(self, p: Sequence[float]) -> list[float]:
        """(k - 1,): how far chunk i follows chunk i + 1, 0 to 1: P(i | i + 1 kept) - P(i | i + 1 dropped)."""
        mean = sum(p) / len(p)
        wanted = max(0.0, 1 - 1 / (self.run_length * (1 - mean))) if mean < 1 else 0.0
        most = [
            min(ours / next_, (1 - ours) / (1 - next_) if next_ < 1 else 0.0) for ours, next_ in pairwise(p)
        ]  # as far as both probabilities can be had
        return [min(wanted, limit) for limit in most]

    @staticmethod
    def probability_after(next_kept: bool, i: int, p: Sequence[float], ties: Sequence[float]) -> float:
        """The probability that chunk i is kept, when it is known whether chunk i + 1 is."""
        return p[i] + ties[i] * (next_kept - p[i + 1])

    @staticmethod
    def weights(kept: Sequence[bool], p: Sequence[float], ties: Sequence[float]) -> Tensor:
        """(k, k), as `ChunkSampler.draw` returns them."""
        k = len(p)
        weights = torch.zeros((k, k), dtype=torch.float64)
        for j in (j for j in range(k) if kept[j]):
            weights[j, j], tie = 1 / p[j], 1.0
            for i in reversed(range(j)):
                tie *= ties[i]
                if kept[i]:
                    weights[j, i] = 1 / (p[i] + (1 - p[j]) * tie)
        return weights


def _keep(probabilities: Tensor) -> Tensor:
    """Weights 1 / p with probability p, else 0."""
    kept = torch.rand(len(probabilities), dtype=torch.float64) < probabilities
    return torch.where(kept, 1 / probabilities, 0)


def _check_probability(min_probability: float) -> None:
    if not 0 < min_probability <= 1:
        raise ValueError(f"min_probability={min_probability} is no probability above 0: write one up to 1")


def _check_budget(budget: float) -> None:
    if isinstance(budget, bool) or not budget >= 1:
        raise ValueError(f"budget={budget} is less than one chunk: write how many chunks to keep")
