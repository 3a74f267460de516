"""The docs' tables are those of the committed results, and a GPU's results fill theirs without a line of code
more."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from chunkdist.bench import spaco, step
from chunkdist.bench.environment import provenance
from chunkdist.bench.jobs import JOBS
from chunkdist.bench.sizes import SIZES
from chunkdist.bench.ways import BASELINE, baselines, chunked
from tests.helpers.tiny_run import ROOT, load_script


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script(ROOT / "docs" / "make_benchmarks.py")


def test_pages_are_up_to_date(script: ModuleType) -> None:
    assert script.main(["--check"]) == 0, "run python docs/make_benchmarks.py"


def test_a_page_that_is_not_up_to_date_is_told(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "benchmarks.md"
    page.write_text(script.PAGE.read_text().replace("| to reach |", "| reached |"))
    monkeypatch.setattr(script, "PAGE", page)
    assert script.main(["--check"]) == 1
    assert "benchmarks.md is not up to date" in capsys.readouterr().out
    assert script.main([]) == 0
    assert page.read_text() == (ROOT / "docs" / "benchmarks.md").read_text()


def on_gpu(name: str, *given: str) -> dict[str, Any]:
    result = provenance(name, ["--device", "cuda", *given])
    return {**result, "hardware": {**result["hardware"], "gpu": "Made-up GPU"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real results of tiny steps, as if they came from a GPU, and some of what can be made up."""
    settings: dict[str, Any] = {
        "device": "cpu",
        "dtype": torch.float32,
        "num_rounds": 1,
        "write": lambda result: None,
    }
    sizes, paper = SIZES["smoke"], baselines(16, on_gpu=False)
    found = step.measure(
        sizes, [paper[0], paper[3], *chunked(16)[:2]], [32, 64], report=lambda line: None, **settings
    )
    factor = 16384 // 64
    for row in found["rows"]:
        row |= {"num_tokens": row["num_tokens"] * factor, "peak_allocated_bytes": row["num_tokens"] * 2**24}
        row |= {"median_wall_s": 3.0 if row["way"] == "the paper's chunk loop" else 2.0}
    for row in found["rows"]:
        if row["way"] == "chunked, K/V kept":
            row |= {"wall_ratio": row["num_tokens"] / 16384 / 4, "mfu": 0.123}
    long = {**found, "rows": [{**row, "num_tokens": row["num_tokens"] * 4} for row in found["rows"]]}
    peaks = {"peak_allocated_bytes": 20 * 2**30, "peak_reserved_bytes": 22 * 2**30}
    warmed_up = {**peaks, "num_tokens": 131072, "way": "chunked, host offload", "outcome": step.WARMED_UP}
    warmed_up |= {"largest_gradient_difference": 0.0, "compared_with": "chunked, host offload"}
    small = replace(sizes, num_tokens=64, chunk_size=4)
    once = {"num_repetitions": 1, "memory_gib": None}
    made = {
        "step-8b": {**on_gpu("step"), **once, **found},
        "step-8b-64k": {**on_gpu("step"), **once, **long, "partial": True},
        "step-8b-24gib-128k": {
            **on_gpu("step"),
            **once,
            **found,
            "baseline": "chunked, host offload",
            "memory_gib": 24,
            "rows": [warmed_up],
            "failed": "stopped after 265 s",
        },
        "spaco-1b": {**on_gpu("spaco"), "num_repetitions": 1, **spaco.measure(small, [8], **settings)},
        "max-length-24gib": {
            **on_gpu("max-length"),
            "memory_gib": 24,
            "method": "steps on the GPU",
            "rows": [{"way": "chunked, host offload", "fits": 135168, "fails": 139264, "out_of_time": False}],
        },
        "overhead-8b": {**on_gpu("overhead"), "failed": "stopped after 60 s", "errors": "none"},
        "step-1b": {**on_gpu("step"), **once, **found, "failed": "stopped after 70 s"},
    }
    made["spaco-1b"]["summary"]["8 chunks"]["faster_than_exact"] = 3.21
    target: Path = tmp_path_factory.mktemp("results")
    for name, result in made.items():
        (target / f"{name}.json").write_text(json.dumps(result))
    return target


def test_results_of_a_gpu_fill_the_page(script: ModuleType, folder: Path, tmp_path: Path) -> None:
    page = script.page_of_results(script.PAGE.read_text(), folder)
    ratios = "chunked, K/V kept: 0.12 x at 8,192, 0.25 x at 16,384, 0.12 x at 32,768, 0.25 x at 65,536"
    assert f"to gradient checkpointing | 1.00 x | {ratios} (partial: step-8b-64k) |" in page
    assert "the same within 24 GiB | 1.00 x | not yet measured |" in page
    assert "faster than the paper's loop | 1.3 x | 1.50 x: chunked, K/V kept |" in page
    best = "12.3% at 65,536: chunked, K/V kept (partial: step-8b-64k)"
    assert f"model FLOP utilisation | 50 % | {best} |" in page
    longest = "135,168; a step of 131,072, 22.00 GiB reserved (partial: step-8b-24gib-128k)"
    assert f"8B with LoRA | 131,072 | {longest} |" in page
    assert "faster than SeCO | 3 x | 3.21 x |" in page
    assert "to the no-grad forward | 1.3 x | not yet measured |" in page
    assert "On Made-up GPU." in page
    assert page.count("not yet measured: `chunkdist bench") == len(JOBS) - len(list(folder.iterdir()))
    assert "stopped after 60 s: `python -m chunkdist.bench.overhead --device cuda`" in page
    _, _, stopped = page.partition("stopped after 70 s: `python -m chunkdist.bench.step --device cuda`")
    assert "chunked, K/V kept" in stopped.partition("###")[0], "what there was is shown"
    assert "```" not in page.partition("stopped after 60 s")[2].partition("###")[0]
    for text in (
        "tokens of a sequence in one step of training",
        "MFU: model FLOPs",
        "its parts: the no-grad",
    ):
        assert text in page
    assert "(figures/step-8b.svg)" in page
    assert script.page_of_results(page, folder) == page
    _, _, unfinished = page.partition("it did not end: `python -m chunkdist.bench.step --device cuda`")
    assert "65,536 tokens" in unfinished.partition("###")[0], (
        "what a run that was killed has written is shown"
    )
    assert [file.name for file in script.write_figures(folder, tmp_path)] == ["step-8b.svg"]
    assert "gradient checkpointing" in (tmp_path / "step-8b.svg").read_text()
    assert "Made-up" not in script.page_of_results(page, tmp_path)


def test_a_longest_length_out_of_time_is_a_lower_bound(script: ModuleType) -> None:
    row = {"way": "chunked, host offload", "fits": 135168, "fails": None, "out_of_time": True}
    assert (
        script._longest({"max-length-24gib": {"benchmark": "max-length", "rows": [row]}})
        == "at least 135,168"
    )


def test_every_figure_is_of_jobs_that_there_are(script: ModuleType) -> None:
    read = {file for _, _, files, _ in script.SUMMARY for file in files}
    assert read <= {job.file for job in JOBS}


def test_gradients_that_are_wrong_are_told_beside_those_that_are_not(script: ModuleType) -> None:
    def row(way: str, difference: float) -> dict[str, Any]:
        figures = {"largest_gradient_difference": difference, "compared_with": BASELINE}
        return {"way": way, "outcome": "ran", **figures}

    rows = [row("chunked", 0.01), row("chunked, K/V kept", float("nan"))]
    assert script._exact({"step": {"rows": rows}}) == "nan"
    rows[1]["outcome"] = "wrong gradients: all"
    assert script._exact({"step": {"rows": rows}}) == "1.0e-02; chunked, K/V kept: wrong gradients: all"


def test_utilisation_by_variant_is_told_best_first(script: ModuleType) -> None:
    rows = [
        {"way": way, "outcome": "ran", "mfu": mfu, "num_tokens": 65536}
        for way, mfu in (("slow", 0.2), ("fast", 0.55))
    ]
    results = {"step-4-layers-variants": {"rows": [*rows, {"way": "none", "outcome": "out of memory"}]}}
    results["step-4-layers-fa3"] = {"rows": [{**rows[1], "mfu": 0.6}]}
    told = "fast, FlashAttention-3 60.0%; fast 55.0%; slow 20.0%"
    assert script._utilisation_by_variant(results) == told


def test_figures_that_mean_nothing_are_not_shown(script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "step-8b.json").write_text(json.dumps(provenance("step", ["--smoke"])))
    with pytest.raises(ValueError, match=r"step-8b\.json is of a run with --smoke"):
        script.results_of(tmp_path)


def test_a_page_without_marks(script: ModuleType) -> None:
    with pytest.raises(ValueError, match="begin: summary"):
        script.page_of_results("no marks")
