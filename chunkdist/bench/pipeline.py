"""`python -m chunkdist.bench.pipeline`: bubbles of pipelines, simulated.

Four tables. The example of ChunkFlow (arXiv 2503.02356, figures 2 and 6): sequences of 4, 2, 1 and 1 units on
four stages, a backward twice a forward; its 57.1 % and our two schedules can be checked by hand. And global
batches of long-tailed data at the cost of Llama-3-8B, in stages of equal cost, and in stages of whole
layers, of which the last one has the head. Of whole layers, what `choose_pipeline` chooses for the first
batches, on all batches. And stages of which a rank has several.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from chunkdist.bench.environment import provenance, write_result
from chunkdist.bench.pipeline_interleaved import simulate_ranks
from chunkdist.bench.sizes import LLAMA_3_8B
from chunkdist.data.cost import SequenceCost
from chunkdist.data.long_tail import long_tailed_lengths
from chunkdist.pipeline.plan import choose_pipeline, simulate_plan
from chunkdist.pipeline.runs import pack_runs
from chunkdist.pipeline.schedule import schedule_1f1b
from chunkdist.pipeline.simulate import CellCosts, Timeline, simulate
from chunkdist.pipeline.stage_cut import cut_stages

PUBLISHED = {"1f1b": 0.571, "K=1": 0.541, "K=2": 0.478}
"""Of ChunkFlow's example. 47.8 % is 11 / 23, a step that takes 23 forwards of a chunk, of which 12 are work:
plain 1F1B in which the short chunks go first and the long sequence last, nothing run again. 54.1 % is what no
order of the four chunks gives, reruns counted as work or as bubble (tests/pipeline/test_published.py); if K=1
is 8 % faster than 1F1B, as said there, it takes 26, and 53.8 % is no work, with reruns counted as bubble."""
UNITS = (4, 2, 1, 1)
NUM_SEQUENCES, BATCH_SEQUENCES, NUM_STAGES = 100_000, 256, 8
CHUNK_SIZES = (512, 1024, 2048)
SETTINGS = (
    *(("equal", 0, 1), ("equal", 0, 2), ("equal", 1, 1), ("equal", 1, 2), ("equal", 4, 1), ("equal", 4, 2)),
    ("whole layers", 1, 2),
)
"""Stages, retained chunks, forwards ahead."""
CHOSEN_FROM, ROOMS = 4, (50_000, 100_000, 200_000)
"""Batches by which is chosen; tokens times layers of which a stage may hold graphs."""
BUBBLE_TARGET = 0.15
STAGES_OF_RANK, EVERY = (1, 2), 39
"""For interleaved stages, of every so many-th batch."""


def example() -> list[dict[str, Any]]:
    """ChunkFlow's example: 1F1B of equal and of given lengths, then chunks of 2 units."""
    rows = []
    for name, lengths in (("1f1b, equal lengths", None), ("1f1b", list(UNITS))):
        schedule = schedule_1f1b([1] * 4, num_stages=4)
        found = simulate(schedule, CellCosts.uniform(schedule, 1.0 if lengths is None else lengths))
        rows.append(_row(found) | {"name": name, "published": PUBLISHED.get(name)})
    for retained in (1, 2):
        runs = [run.num_chunks for run in pack_runs(UNITS, 2)]
        schedule = schedule_1f1b(runs, num_stages=4, retained_chunks=retained)
        name = f"K={retained}"
        found = simulate(schedule, CellCosts.uniform(schedule))
        rows.append(_row(found) | {"name": name, "published": PUBLISHED[name]})
    return rows


def long_tailed(*, max_batches: int | None = None) -> list[dict[str, Any]]:
    """For each setting, the largest and the mean bubble of a batch, and over all batches by their time."""
    batches = global_batches()[:max_batches]
    rows = []
    stages_of = {"equal": equal_stages(NUM_STAGES), "whole layers": whole_layers(NUM_STAGES)}
    for chunk_size in CHUNK_SIZES:
        packed = [pack_runs(batch, chunk_size) for batch in batches]
        for name, retained, ahead in SETTINGS:
            stages, head = stages_of[name]
            found = []
            for runs in packed:
                schedule = schedule_1f1b(
                    [run.num_chunks for run in runs],
                    num_stages=NUM_STAGES,
                    retained_chunks=retained,
                    forwards_ahead=ahead,
                )
                costs = CellCosts.of_runs(schedule, runs, stages, head_per_token=head)
                found.append(simulate(schedule, costs))
            setting = {"stages": name, "chunk_size": chunk_size, "retained_chunks": retained}
            empty = sum(run.num_empty for runs in packed for run in runs)
            slots = sum(run.num_chunks * chunk_size for runs in packed for run in runs)
            rows.append(setting | {"forwards_ahead": ahead, "empty_share": empty / slots} | _over(found))
    return rows


def chosen(*, max_batches: int | None = None, **settings: Any) -> list[dict[str, Any]]:
    """For each room, what is chosen by the first batches, and what all batches then have.

    Args:
        settings: Of `choose_pipeline`, to compare less.
    """
    layer, head, num_layers = _parts()
    layers = [layer] * num_layers
    rows = []
    for room in ROOMS:
        plan = choose_pipeline(
            global_batches()[:CHOSEN_FROM][:max_batches],
            layers,
            num_stages=NUM_STAGES,
            head_per_token=head,
            max_graph_tokens=room,
            **settings,
        )
        batches = global_batches()[:max_batches]
        found = [simulate_plan(plan, batch, layers, head_per_token=head) for batch in batches]
        setting = {
            "max_graph_tokens": room,
            "chunk_size": plan.chunk_size,
            "layers": [len(stage) for stage in plan.stages],
            "retained_chunks": list(plan.retained_chunks),
            "forwards_ahead": plan.forwards_ahead,
        }
        above = sum(timeline.bubble_share > BUBBLE_TARGET for timeline in found)
        rows.append(setting | _over(found) | {"num_batches_above_target": above})
    return rows


def interleaved(*, max_batches: int | None = None) -> list[dict[str, Any]]:
    """Stages of equal cost, one or two of them a rank; graphs count by the layers of a rank."""
    batches = global_batches()[::EVERY][:max_batches]
    rows = []
    for chunk_size in CHUNK_SIZES:
        for ahead in (1, 2):
            for num_stages in STAGES_OF_RANK:
                stages, head = equal_stages(NUM_STAGES * num_stages)
                found = []
                for runs in (pack_runs(batch, chunk_size) for batch in batches):
                    schedule = schedule_1f1b(
                        [run.num_chunks for run in runs],
                        num_stages=len(stages),
                        retained_chunks=1,
                        forwards_ahead=ahead,
                    )
                    costs = CellCosts.of_runs(schedule, runs, stages, head_per_token=head)
                    found.append(simulate_ranks(schedule, costs, NUM_STAGES))
                rows.append(
                    {
                        "chunk_size": chunk_size,
                        "forwards_ahead": ahead,
                        "stages_of_rank": num_stages,
                        "num_batches": len(found),
                        "mean_bubble": sum(timeline.bubble_share for timeline in found) / len(found),
                        "duration": sum(timeline.duration for timeline in found),
                        "peak_graphs": max(max(timeline.graphs) for timeline in found) / num_stages,
                    }
                )
    return rows


@cache
def global_batches() -> list[list[int]]:
    """Tokens of the sequences of each."""
    lengths = long_tailed_lengths(NUM_SEQUENCES)
    starts = range(0, len(lengths) - BATCH_SEQUENCES + 1, BATCH_SEQUENCES)
    return [lengths[start : start + BATCH_SEQUENCES] for start in starts]


def equal_stages(num_stages: int) -> tuple[list[SequenceCost], float]:
    """Llama-3-8B as if it could be cut anywhere, the head included."""
    layer, head, num_layers = _parts()
    per_token = (layer.per_token * num_layers + head) / num_stages
    pairs = tuple((window, cost * num_layers / num_stages) for window, cost in layer.per_pair)
    return [SequenceCost(per_token=per_token, per_pair=pairs)] * num_stages, 0.0


def whole_layers(num_stages: int) -> tuple[list[SequenceCost], float]:
    """Llama-3-8B in stages of whole layers, and the head."""
    layer, head, num_layers = _parts()
    cut = cut_stages([layer.per_token] * num_layers, num_stages, head_cost=head)
    stages = [
        SequenceCost(
            per_token=layer.per_token * len(layers),
            per_pair=tuple((window, cost * len(layers)) for window, cost in layer.per_pair),
        )
        for layers in cut
    ]
    return stages, head


def _parts() -> tuple[SequenceCost, float, int]:
    """FLOPs of a layer, FLOPs per token of the head, and the number of layers."""
    sizes = LLAMA_3_8B
    hidden, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    kv_size = hidden // heads * sizes["num_key_value_heads"]
    weights = 2 * hidden * hidden + 2 * hidden * kv_size + 3 * hidden * sizes["intermediate_size"]
    layer = SequenceCost(per_token=6 * weights, per_pair=((None, 12 * hidden),))
    return layer, 6.0 * hidden * sizes["vocab_size"], sizes["num_hidden_layers"]


def _row(timeline: Timeline) -> dict[str, Any]:
    return {
        "duration": timeline.duration,
        "bubble_share": timeline.bubble_share,
        "rerun_share": timeline.rerun_share,
        "peak_graphs": list(timeline.schedule.peak_graphs()),
    }


def _over(found: Sequence[Timeline]) -> dict[str, Any]:
    total = sum(timeline.duration for timeline in found)
    bubbles = [timeline.bubble_share for timeline in found]
    return {
        "num_batches": len(found),
        "largest_bubble": max(bubbles),
        "mean_bubble": sum(bubbles) / len(bubbles),
        "bubble_share": sum(timeline.bubble_share * timeline.duration for timeline in found) / total,
        "rerun_share": sum(timeline.rerun_share * timeline.duration for timeline in found) / total,
        "duration": total,
        "peak_graphs": max(max(timeline.schedule.peak_graphs()) for timeline in found),
    }


def table(result: dict[str, Any]) -> str:
    """For people to read."""
    lines = [f"{'':22}{'takes':>7}{'bubble':>9}{'reruns':>9}{'published':>11}"]
    for row in result["example"]:
        published = "-" if row["published"] is None else f"{row['published']:.1%}"
        lines.append(
            f"{row['name']:22}{row['duration']:7.0f}{row['bubble_share']:9.1%}{row['rerun_share']:9.1%}{published:>11}"
        )
    lines += ["", f"{'stages':14}{'chunk':>6}{'K':>3}{'ahead':>7}{'largest':>9}{'mean':>7}{'all':>7}"]
    lines[-1] += f"{'reruns':>9}{'graphs':>8}"
    for row in result["long_tailed"]:
        lines.append(
            f"{row['stages']:14}{row['chunk_size']:6,}{row['retained_chunks']:3}{row['forwards_ahead']:7}"
            f"{row['largest_bubble']:9.1%}{row['mean_bubble']:7.1%}{row['bubble_share']:7.1%}"
            f"{row['rerun_share']:9.1%}{row['peak_graphs']:8}"
        )
    lines += [
        "",
        f"{'room':>9}{'chunk':>6}{'ahead':>7}{'largest':>9}{'mean':>7}{'above 15 %':>12}  layers, K",
    ]
    for row in result["chosen"]:
        lines.append(
            f"{row['max_graph_tokens']:9,}{row['chunk_size']:6,}{row['forwards_ahead']:7}"
            f"{row['largest_bubble']:9.1%}{row['mean_bubble']:7.1%}{row['num_batches_above_target']:12}  "
            f"{row['layers']}, {row['retained_chunks']}"
        )
    lines += ["", f"{'a rank has':>11}{'chunk':>6}{'ahead':>7}{'mean':>7}{'graphs':>8}{'duration':>11}"]
    for row in result["interleaved"]:
        lines.append(
            f"{row['stages_of_rank']:11}{row['chunk_size']:6,}{row['forwards_ahead']:7}{row['mean_bubble']:7.1%}"
            f"{row['peak_graphs']:8.1f}{row['duration']:11.4g}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="chunkdist bench pipeline", description="Bubbles, simulated.")
    parser.add_argument("--smoke", action="store_true", help="two batches of each setting")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the figures go")
    options = parser.parse_args(given)
    max_batches = 2 if options.smoke else None
    less: dict[str, Any] = {"chunk_sizes": (512,), "retained_chunks": (1,), "forwards_ahead": (1,)}
    result = {
        **provenance("pipeline", given),
        "example": example(),
        "long_tailed": long_tailed(max_batches=max_batches),
        "chosen": chosen(max_batches=max_batches, **(less if options.smoke else {})),
        "interleaved": interleaved(max_batches=max_batches),
    }
    print(table(result))
    write_result(result, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
