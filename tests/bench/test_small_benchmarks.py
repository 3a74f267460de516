"""gradient-error, offload, overhead: they run in small, and their figures are what they are said to be."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from chunkdist.bench import attention, gradient_error, long_tail, offload, overhead, spaco
from chunkdist.bench.environment import write_partial
from chunkdist.bench.python_time import CHUNKDIST, OTHER
from chunkdist.bench.sizes import SIZES
from chunkdist.bench.ways import BASELINE, Way, prepared


def result_of(benchmark: Any, tmp_path: Path, *given: str) -> dict[str, Any]:
    file = tmp_path / "result.json"
    assert benchmark.main(["--smoke", *given, "--json", str(file)]) == 0
    result: dict[str, Any] = json.loads(file.read_text())
    return result


def test_gradient_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = result_of(gradient_error, tmp_path, "--num-tokens", "40", "--chunk-sizes", "16")
    rows = {row["way"]: row for row in result["rows"]}
    assert rows["plain"]["ratio_to_plain"] == 1
    for row in result["rows"]:
        assert 1e-4 < row["error"] < 2e-2, "that of bf16"
        assert row["worst"] >= row["error"] * 0.9
        assert row["way"] in capsys.readouterr().out or row["way"] in gradient_error.table(result)
    assert result["largest_ratio_to_plain"] < 1.5


def test_the_truth_is_the_plain_models_gradient() -> None:
    model, ids = SIZES["smoke"].model("cpu", torch.float64), SIZES["smoke"].tokens("cpu")
    one_chunk = gradient_error.ChunkConfig(chunk_size=64, attention="math")
    found = gradient_error.gradients(model, ids, Way(name="", config=one_chunk))
    plain = gradient_error.gradients(model, ids, Way(name="", method="plain"))
    assert gradient_error.errors(found, plain)["worst"] < 1e-12
    name = next(iter(plain))
    wrong = {**plain, name: plain[name] * 1.5}
    assert gradient_error.errors(wrong, plain)["worst"] == pytest.approx(0.5)


def test_offload(tmp_path: Path) -> None:
    result = result_of(offload, tmp_path, "--repetitions", "1")
    assert list(result["summary"]) == [way.name for way in offload.ways(16)]
    assert all(row["largest_gradient_difference"] == 0 for row in result["summary"].values())
    assert result["baseline"] == "chunked"


def test_overhead(tmp_path: Path) -> None:
    result = result_of(overhead, tmp_path, "--chunk-sizes", "16", "32", "--num-layers", "1")
    assert [row["num_cells"] for row in result["rows"]] == [2, 8, 4]
    for row in result["rows"]:
        assert 0 < row["kernel_share"] <= 1
        shares = row["python_shares"]
        assert sum(shares.values()) == pytest.approx(1)
        of_baseline = result["rows"][0]["python_shares"][CHUNKDIST]
        assert row["way"] == BASELINE or shares[CHUNKDIST] > 2 * of_baseline
        assert list(shares.values()) == sorted(shares.values(), reverse=True)
        assert shares[OTHER] < 0.3
        assert row["host_s_per_cell"] * row["num_cells"] == pytest.approx(row["host_s"])


def stopped(benchmark: Any, tmp_path: Path, *given: str) -> dict[str, Any]:
    """What is left of a run that is stopped when it would write for the second time."""
    file, written = tmp_path / "stopped.json", []

    def write(result: dict[str, Any], file: Path | None) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(file)
        write_partial(result, file)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "write_partial", write)
        with pytest.raises(KeyboardInterrupt):
            benchmark.main(["--smoke", *given, "--json", str(file)])
    result: dict[str, Any] = json.loads(file.read_text())
    assert benchmark.table(result)
    assert result["partial"]
    return result


def test_what_stopped_runs_leave_can_be_read(tmp_path: Path) -> None:
    given = ["--repetitions", "1", "--chunk-sizes", "32"]
    assert [row["way"] for row in stopped(overhead, tmp_path, *given)["rows"]] == [BASELINE]
    (only,) = stopped(spaco, tmp_path, "--repetitions", "1")["rounds"]
    assert list(only) == ["no-grad forward"]
    assert [row["backend"] for row in stopped(attention, tmp_path)["rows"]] == ["cpu_flash"]
    given_long = ["--without-simulation", "--repetitions", "1"]
    assert list(stopped(long_tail, tmp_path, *given_long)["summary"]) == [long_tail.BASELINE]
    given = ["--num-tokens", "32", "--chunk-sizes", "16"]
    assert [row["way"] for row in stopped(gradient_error, tmp_path, *given)["rows"]] == ["plain"]
    assert list(tmp_path.iterdir()) == [tmp_path / "stopped.json"]


def test_kernels_are_counted_once() -> None:
    a = torch.randn(300, 300)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        torch.nn.functional.linear(a, a)
    total = max(event.cpu_time_total for event in found.key_averages()) / 1e6
    assert 0 < overhead.kernel_seconds(found, on_gpu=False) <= total * 1.01


def test_on_a_gpu_what_launches_kernels_is_none() -> None:
    """Two kernels on two streams overlap; the operator and the launch of the first, and a range around it,
    which has a row on the device too, are no kernels."""

    def event(name: str, device: str, start: float, end: float, *, is_range: bool = False) -> SimpleNamespace:
        times = SimpleNamespace(start=start * 1e6, end=end * 1e6)
        kind = SimpleNamespace(name=device)
        return SimpleNamespace(name=name, device_type=kind, time_range=times, is_user_annotation=is_range)

    events = [
        event("aten::mm", "CPU", 0, 10),
        event("cudaLaunchKernel", "CPU", 0, 1),
        event("step", "CUDA", 0, 20, is_range=True),
        event("gemm", "CUDA", 2, 5),
        event("copy", "CUDA", 4, 6),
        event("relu", "CUDA", 8, 9),
    ]
    found: Any = SimpleNamespace(events=lambda: events)
    assert overhead.kernel_seconds(found, on_gpu=True) == pytest.approx(5)
    assert overhead.kernel_seconds(found, on_gpu=False) == pytest.approx(10)


def test_a_way_leaves_no_trace() -> None:
    model, ids = SIZES["smoke"].model("cpu", torch.float32), SIZES["smoke"].tokens("cpu")
    for way in (Way(name="", method="paper", chunk_size=16), Way(name="", saved_on_host=True)):
        with prepared(model, way, on_gpu=False) as step:
            step(ids)
    assert model.config._attn_implementation == "sdpa"
    assert not model.is_gradient_checkpointing
