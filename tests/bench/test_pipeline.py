"""The benchmark of pipelines runs in its smallest size, and its example is what can be checked by hand."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from chunkdist.bench import pipeline


def test_smoke(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "pipeline.json"
    assert pipeline.main(["--smoke", "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    assert [row["duration"] for row in result["example"]] == [21, 56, 23, 21]
    assert len(result["long_tailed"]) == len(pipeline.SETTINGS) * len(pipeline.CHUNK_SIZES)
    for row in result["long_tailed"]:
        assert row["num_batches"] == 2
        assert 0 < row["bubble_share"] <= row["largest_bubble"] < 0.3
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
    assert {row["num_batches"] for row in result["long_tailed"]} == {390}
