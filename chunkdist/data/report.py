"""What a plan of streams costs each rank, and what of it is waste; a histogram of lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from chunkdist.data.assignment import BatchPlan
from chunkdist.data.cost import SequenceCost
from chunkdist.data.streams import stream_of
from chunkdist.files import save_figure

Table = tuple[tuple[float, ...], ...]


@dataclass(frozen=True, kw_only=True)
class PackingReport:
    """How full and how even the streams of a global batch are, or of several one after another.

    Args:
        tokens: By rank and micro-batch; what sequences of a stream begin with in common counts once.
        costs: By rank and micro-batch, in the unit of the cost model (FLOPs).
        imbalance: The largest cost of a rank over the mean, 1 at best; the mean over the batches.
        recomputed_share: Share of the tokens whose chunk is run again in the backward.
        empty_share: Share of the slots of all chunks, if each had `chunk_size`, that hold no token. Nothing
            is computed in them: a stream's last chunk is just shorter.
    """

    tokens: tuple[tuple[int, ...], ...]
    costs: Table
    imbalance: float
    recomputed_share: float
    empty_share: float

    @classmethod
    def of(
        cls,
        plans: Sequence[BatchPlan],
        lengths: Sequence[int],
        *,
        cost: SequenceCost,
        chunk_size: int,
        retained_chunks: int = 0,
    ) -> PackingReport:
        """
        Args:
            plans: Assignments to the same number of ranks.
            lengths: Tokens of the sequences that the plans' indices mean.
            retained_chunks: As in `ChunkConfig`.
        """
        of_plans = [plan.computed(lengths) for plan in plans]
        by_rank = [[s for plan in of_plans for s in plan[rank]] for rank in range(len(of_plans[0]))]
        tokens = tuple(
            tuple(sum(length - shared for length, shared in stream) for stream in streams)
            for streams in by_rank
        )
        costs = tuple(tuple(_cost(cost, stream) for stream in streams) for streams in by_rank)
        imbalances = []
        for plan in of_plans:
            rank_costs = [sum(_cost(cost, stream) for stream in streams) for streams in plan]
            imbalances.append(max(rank_costs) * len(rank_costs) / sum(rank_costs))
        total = sum(map(sum, tokens))
        recomputed = slots = 0
        for stream in (stream for streams in by_rank for stream in streams if stream):
            cut = stream_of([length - shared for length, shared in stream], chunk_size)
            kept = cut.retained(retained_chunks)
            recomputed += sum(chunk.num_tokens for index, chunk in enumerate(cut.chunks) if index not in kept)
            slots += len(cut.chunks) * chunk_size
        return cls(
            tokens=tokens,
            costs=costs,
            imbalance=sum(imbalances) / len(imbalances),
            recomputed_share=recomputed / total,
            empty_share=1 - total / slots,
        )


def _cost(cost: SequenceCost, stream: Sequence[tuple[int, int]]) -> float:
    return float(sum(cost(length, shared) for length, shared in stream))


def draw_lengths(lengths: Sequence[int], path: Path) -> None:
    """A PNG with the histogram of lengths, in sequences and in tokens: where the sequences are, and where the
    work is. May raise `OSError`, and then has left the file as it was."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    values = np.asarray(lengths)
    edges = np.unique(np.geomspace(values.min(), values.max() + 1, 40).round())
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, weights, label in (
        (figure.add_subplot(2, 1, 1), np.ones(len(values)), "sequences"),
        (figure.add_subplot(2, 1, 2), values, "tokens"),
    ):
        axes.hist(values, bins=edges.tolist(), weights=weights)
        axes.set_xscale("log", base=2)
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    figure.axes[-1].set_xlabel("length of the sequence (tokens)")
    figure.axes[0].set_title(
        f"{len(values):,} sequences, {values.sum():,} tokens; median {np.median(values):,.0f}, "
        f"longest {values.max():,}"
    )
    save_figure(figure, path)
