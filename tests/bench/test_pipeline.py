"""The benchmark of pipelines runs in its smallest size, and its example is what can be checked by hand."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from chunkdist.bench import pipeline
from chunkdist.bench.pipeline_interleaved import simulate_ranks
from chunkdist.pipeline.schedule import schedule_1f1b
from chunkdist.pipeline.simulate import CellCosts, simulate


def test_smoke(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "pipeline.json"
    assert pipeline.main(["--smoke", "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    assert [row["duration"] for row in result["example"]] == [21, 56, 23, 21]
    assert len(result["long_tailed"]) == len(pipeline.SETTINGS) * len(pipeline.CHUNK_SIZES)
    for row in result["long_tailed"]:
        assert row["num_batches"] == 2
        assert 0 < row["bubble_share"] <= row["largest_bubble"] < 0.3
    for row in result["chosen"]:
        assert row["num_batches"] == 2
        assert sum(row["layers"]) == 32
        assert row["mean_bubble"] <= row["largest_bubble"] < 0.3
    assert len(result["interleaved"]) == 2 * 2 * len(pipeline.CHUNK_SIZES)
    lines = capsys.readouterr().out.splitlines()
    assert lines[3].split() == ["K=1", "23", "43.5%", "4.3%", "54.1%"]
    assert lines[4].split() == ["K=2", "21", "42.9%", "0.0%", "47.8%"]


def test_stages_of_whole_layers_have_all_layers_and_the_head() -> None:
    stages, head = pipeline.whole_layers(8)
    equal, none = pipeline.equal_stages(8)
    assert none == 0
    total = sum(stage.per_token for stage in stages) + head
    assert total == pytest.approx(sum(stage.per_token for stage in equal))
    assert total == pytest.approx(6 * (32 * 218_103_808 + 128_256 * 4096))
    assert sum(stage.per_pair[0][1] for stage in stages) == 12 * 4096 * 32
    assert stages[-1].per_token + head < 5.1 * 6 * 218_103_808


def test_ranks_of_one_stage_each_are_simulated_as_elsewhere() -> None:
    """And by hand: one run of two chunks, on two ranks of two stages each."""
    runs = [3, 2, 1, 1]
    schedule = schedule_1f1b(runs, num_stages=4, forwards_ahead=2)
    costs = CellCosts.uniform(schedule, range(1, 1 + sum(runs)))
    ranks, stages = simulate_ranks(schedule, costs, 4), simulate(schedule, costs)
    assert ranks.duration == stages.duration
    assert ranks.bubble_share == pytest.approx(stages.bubble_share)
    assert ranks.graphs == schedule.peak_graphs()
    two = schedule_1f1b([2], num_stages=4, retained_chunks=2)
    # forwards end at 2, 3, 4 and 5; of the backwards, two a cell, the last one is at its last stage alone
    found = simulate_ranks(two, CellCosts.uniform(two), 2)
    assert (found.duration, found.busy) == (5 + 2 + 4 * 2, 2 * 4 * 3)
    assert found.graphs == (4, 4)


def test_the_page_has_the_committed_figures() -> None:
    docs = Path(__file__).parents[2] / "docs"
    spec = importlib.util.spec_from_file_location("make_pipeline_tables", docs / "make_pipeline_tables.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    page = (docs / "pipeline.md").read_text(encoding="utf-8")
    result = json.loads((docs / "benchmarks" / "pipeline.json").read_text(encoding="utf-8"))
    assert script.page_with_tables(page, result) == page
    assert {row["num_batches"] for row in result["long_tailed"] + result["chosen"]} == {390}
    roomy = [row for row in result["chosen"] if row["max_graph_tokens"] >= 100_000]
    assert max(row["mean_bubble"] for row in roomy) < 0.15
    one = [row["duration"] for row in result["interleaved"] if row["stages_of_rank"] == 1]
    two = [row["duration"] for row in result["interleaved"] if row["stages_of_rank"] == 2]
    assert min(one) < min(two), "two stages a rank would pay, says the page not"
