"""The chosen pipeline takes the least simulated time of what fits."""

from __future__ import annotations

import pytest

from chunkdist.data.cost import SequenceCost
from chunkdist.data.long_tail import long_tailed_lengths
from chunkdist.pipeline.plan import choose_pipeline

LAYER_8B = SequenceCost(per_token=6 * 218_103_808, per_pair=((None, 12 * 4096),))
HEAD_8B = 6.0 * 4096 * 128_256
"""FLOPs of Llama-3-8B; its output layer costs as much as 2.4 layers."""
EQUAL = SequenceCost(per_token=3.0)


def test_whole_layers_of_llama_3_8b_on_long_tailed_batches_have_a_bubble_below_15_percent() -> None:
    """No cut of 32 layers and the head in 8 stages alone is that even: reruns are shared out as well."""
    lengths = long_tailed_lengths(100_000)
    plan = choose_pipeline(
        [lengths[:256]],
        [LAYER_8B] * 32,
        num_stages=8,
        head_per_token=HEAD_8B,
        max_graph_tokens=100_000,
        chunk_sizes=(512,),
        retained_chunks=(4,),
        forwards_ahead=(2,),
    )
    assert (len(plan.stages), plan.stages[0].start, plan.stages[-1].stop) == (8, 0, 32)
    assert max(len(stage) for stage in plan.stages) == 5
    assert plan.bubble_share < 0.15
    heavy = [count for count, stage in zip(plan.retained_chunks, plan.stages, strict=True) if len(stage) == 5]
    assert min(heavy) > min(plan.retained_chunks)
    fits = [g * 512 * len(s) <= 100_000 for g, s in zip(plan.peak_graphs, plan.stages, strict=True)]
    assert all(fits)


def test_memory_decides_between_chunk_sizes() -> None:
    settings = {"num_stages": 2, "head_per_token": 0.0, "chunk_sizes": (4, 8), "forwards_ahead": (1,)}
    roomy = choose_pipeline([[8] * 20], [EQUAL] * 4, max_graph_tokens=1000, **settings)  # type: ignore[arg-type]
    tight = choose_pipeline([[8] * 20], [EQUAL] * 4, max_graph_tokens=8, **settings)  # type: ignore[arg-type]
    assert min(roomy.retained_chunks) >= 1
    assert roomy.rerun_share == 0
    assert (tight.chunk_size, tight.retained_chunks, tight.peak_graphs) == (4, (0, 0), (1, 1))
    assert tight.duration > roomy.duration
    with pytest.raises(ValueError, match="max_graph_tokens=7: no setting keeps so few graphs"):
        choose_pipeline([[8] * 20], [EQUAL] * 4, max_graph_tokens=7, **settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batches is empty"):
        choose_pipeline([], [EQUAL] * 4, max_graph_tokens=7, **settings)  # type: ignore[arg-type]


def test_a_stage_with_more_layers_runs_fewer_again() -> None:
    plan = choose_pipeline(
        [[32] * 6],
        [EQUAL] * 3,
        num_stages=2,
        head_per_token=0.0,
        max_graph_tokens=10_000,
        chunk_sizes=(4,),
        retained_chunks=(0,),
        forwards_ahead=(2,),
    )
    assert [len(stage) for stage in plan.stages] == [1, 2]
    assert plan.retained_chunks[0] < plan.retained_chunks[1]
