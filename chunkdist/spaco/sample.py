"""One sequence's sample of chunks, shared by all its layer groups (SpaCO, arXiv 2505.16710, section 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, distributed

from chunkdist.spaco.samplers import ChunkSampler
from chunkdist.stream.stream import Chunk, Stream


@dataclass(frozen=True, kw_only=True)
class SampleReport:
    """What was drawn in one backward.

    Args:
        num_rows: Sequences that share the sample.
        kept: The chunks that are backpropagated.
        relative_variance: Estimate of the variance of the weighted output gradient over its squared norm,
            from weights w and scores s: sum w (w - 1) s^2 / sum s^2, whose mean is sum (1/p - 1) s^2 / sum
            s^2. It leaves out what relays through the keys and values of sampled chunks add, and how chunks'
            gradients add up.
    """

    num_chunks: int
    num_rows: int
    kept: tuple[Chunk, ...]
    largest_weight: float
    relative_variance: float

    @property
    def num_kept(self) -> int:
        return len(self.kept)

    @property
    def tokens_kept(self) -> int:
        """Weights of the chunks, of all rows."""
        return self.num_rows * sum(chunk.num_tokens for chunk in self.kept)


class Sharers(Protocol):
    """Ranks that share the tokens of the stream: they draw one sample."""

    def total(self, x: Tensor) -> Tensor:
        """The sum over the ranks."""
        ...

    def of_first(self, x: Tensor) -> Tensor:
        """The first rank's `x`."""
        ...


class ChunkSample:
    """The weights of one stream's chunks: drawn in the backward of its last group, used in all.

    Args:
        sharers: Ranks that have other parts of the same chunks; `None`: the chunks are whole.
    """

    def __init__(self, sampler: ChunkSampler, stream: Stream, sharers: Sharers | None = None) -> None:
        self._sampler = sampler
        self._stream = stream
        self._sharers = sharers
        self.weights: tuple[float, ...] = ()
        """(k,): of each chunk's output gradient; 0 drops the chunk."""
        self.relays: list[list[float]] | None = None
        """(k, k): [j][i], of what chunk j leaves for the keys and values of chunk i; `None`: all 1."""
        self.report: SampleReport | None = None
        """`None` until drawn, and where no gradient has come in."""

    def draw(self, grad_output: Tensor) -> None:
        """Draws from the norms of the chunks' output gradients (B, T, H). The GPU is waited for once."""
        chunks = self._stream.chunks
        norms = [grad_output[:, chunk.start : chunk.end].float().norm() for chunk in chunks]
        scores = torch.stack(norms).double()
        if self._sharers is not None:
            scores = self._sharers.total(scores**2).sqrt()
        scores = scores.cpu()
        with _rank_generator():
            drawn = self._sampler.draw(scores).double()
        if self._sharers is not None:
            drawn = self._sharers.of_first(drawn.to(grad_output.device)).cpu()
        k = len(chunks)
        if drawn.shape not in ((k,), (k, k)) or not bool((drawn.isfinite() & (drawn >= 0)).all()):
            raise ValueError(
                f"{type(self._sampler).__name__}.draw returned {drawn.tolist()}: it must return {k} finite "
                f"weights, or {k} x {k}, none negative"
            )
        weights, relays = (drawn, drawn.expand(k, k)) if drawn.ndim == 1 else (drawn.diagonal(), drawn)
        earlier = relays.tril(-1)  # only what an earlier chunk gets
        if bool(earlier[:, weights == 0].any()):
            raise ValueError(
                f"{type(self._sampler).__name__}.draw gives a relay to a chunk that it drops: write 0 there"
            )
        self.weights = tuple(weights.tolist())
        self.relays = None if torch.equal(earlier, torch.ones_like(earlier).tril(-1)) else relays.tolist()
        if not bool(scores.any()):  # nothing comes in: a stream that fills up, or has no supervised token
            return
        kept = tuple(
            self._stream.in_whole(chunk) for chunk, weight in zip(chunks, self.weights, strict=True) if weight
        )
        noise = (weights * (weights - 1) * scores**2).sum() / (scores**2).sum().clamp(
            min=torch.finfo(torch.float64).tiny
        )
        self.report = SampleReport(
            num_chunks=len(chunks),
            num_rows=grad_output.shape[0],
            kept=kept,
            largest_weight=max(self.weights),
            relative_variance=float(noise),
        )


class _rank_generator:
    """Inside, the default CPU generator is seeded from its own next number and the rank: all ranks often have
    the same state, and each must draw its own sample. One number is taken, so a resumed run draws the
    same."""

    def __enter__(self) -> None:
        seed = int(torch.randint(2**62, ()))
        rank = distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0
        self._state = torch.get_rng_state()
        torch.default_generator.manual_seed(seed + rank)

    def __exit__(self, *error: object) -> None:
        torch.set_rng_state(self._state)
