"""The benchmarks of SpaCO run, in their smallest size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from chunkdist.bench import spaco, spaco_study
from chunkdist.bench.spaco_direct import chunk_gradients
from tests.helpers.models import tiny_llama


def test_shares_of_chunks_add_up_to_the_gradient() -> None:
    model, row = tiny_llama(dtype=torch.float64), torch.arange(12) % 7
    squares, whole = chunk_gradients(model, row, 4)
    linear = [m.weight for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    assert float(whole) == pytest.approx(sum(float(w.grad.square().sum()) for w in linear), rel=1e-5)
    only, same = chunk_gradients(model, row, 1)
    assert float(only) == pytest.approx(float(whole), rel=1e-5)
    assert float(same) == pytest.approx(float(whole), rel=1e-5)
    assert float(squares.sum()) > float(whole) / 4, "chunks that point the same way: at least this"


def test_cost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "spaco.json"
    assert spaco.main(["--smoke", "--repetitions", "2", "--budgets", "2", "16", "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    assert len(result["rounds"]) == 2
    row, whole = result["summary"]["2 chunks"], result["summary"]["16 chunks"]
    ratios = [
        sum(one["2 chunks"]) / (one["no-grad forward"][0] + 2 / 16 * one["exact step"][1])
        for one in result["rounds"]
    ]
    assert row["ratio"] == pytest.approx(sum(ratios) / 2)
    assert row["of_exact"] < whole["of_exact"]
    forward, exact = (result["summary"][name]["median_s"] for name in ("no-grad forward", "exact step"))
    assert 0.5 * row["median_s"] / forward < row["of_forward"] < 2 * row["median_s"] / forward
    assert 0.5 * exact / row["median_s"] < row["faster_than_exact"] < 2 * exact / row["median_s"]
    assert "2 chunks, no control variate" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--num-tokens", "100"], ["--budgets", "0"], ["--repetitions", "0"]])
def test_bad_sizes(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        spaco.main(["--smoke", *arguments])


def test_a_study_goes_on_where_it_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "study.json"
    arguments = ["--smoke", "--json", str(file), "--samplers", spaco_study.PAPERS]
    assert spaco_study.main(arguments) == 0
    found = json.loads(file.read_text())
    contenders = 1 + len(spaco_study.BUDGET_DIVISORS)
    assert len(found["runs"]) == contenders * (
        2 + 1
    )  # two learning rates, and another seed with the better one
    assert len(found["gradient_errors"]) == len(spaco_study.SAMPLERS) * len(spaco_study.BUDGET_DIVISORS)
    assert all(row["rms_error"] > 0 for row in found["gradient_errors"])
    first = capsys.readouterr().out
    assert first.count(spaco_study.PAPERS) == len(spaco_study.BUDGET_DIVISORS)

    again = []
    monkeypatch.setattr(spaco_study.Study, "train", lambda *args: again.append(args))
    assert spaco_study.main(arguments) == 0
    assert again == []
    assert capsys.readouterr().out == first


def test_runs_of_other_sizes_are_not_mixed(tmp_path: Path) -> None:
    file = tmp_path / "study.json"
    file.write_text('{"sizes": {"num_tokens": 1}}')
    with pytest.raises(SystemExit):
        spaco_study.main(["--smoke", "--json", str(file)])
    assert file.read_text() == '{"sizes": {"num_tokens": 1}}'
