"""Every benchmark runs in its smallest size, with torch, transformers and peft and what those need alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from chunkdist.bench import BENCHMARKS
from chunkdist.bench.report import text
from chunkdist.bench.variants import BASELINE, KEPT, OFFLOADED, PLANNED, TWICE, baselines, chunked
from tests.helpers.tiny_run import ROOT

pytestmark = pytest.mark.slow
OTHERS = ("trl", "datasets", "deepspeed", "wandb", "matplotlib", "rich", "bitsandbytes", "flash_attn")
OPTIONS = {
    "attention": [],
    "long-tail": [],
    "max-length": [],
    "memory": [],
    "profile": ["--trace", "trace.json"],
    "sharding": ["--only", "units"],
    "spaco": ["--budgets", "2", "16"],
    "step": [
        "--num-tokens",
        "40",
        "64",
        "--chunk-sizes",
        "8",
        "--groups",
        "2",
        "--offload",
        "--extras",
        "all",
    ],
}
SCRIPT = f"""
import importlib.util, sys
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.split(".")[0] in {OTHERS} else real(name, *rest)

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {OTHERS}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, NotInstalled())
if __name__ == "__main__":  # ranks come here, too
    from chunkdist.cli.main import main

    for name, options in {OPTIONS!r}.items():
        status = main(["bench", name, "--smoke", *options, "--json", name + ".json"])
        assert status == 0, (name, status)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("results")
    (target / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "script.py"],
        cwd=target,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (target / "out.txt").write_text(done.stdout)
    return target


def result_of(name: str, folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return result


def test_every_benchmark_writes_what_it_ran_and_prints_it(folder: Path) -> None:
    assert OPTIONS.keys() == BENCHMARKS.keys() - {"all", "compare"}
    out = (folder / "out.txt").read_text()
    for name in OPTIONS:
        result = result_of(name, folder)
        assert result["command"].startswith(f"chunkdist bench {name} --smoke")
        assert result["versions"]["torch"]
        assert result["hardware"]["cpu"]
        assert "partial" not in result
        assert result["rows"]
        assert text(result) in out
    assert not list(folder.glob("*.part"))


def test_step(folder: Path) -> None:
    result = result_of("step", folder)
    names = [
        *(variant.name for variant in baselines(16, on_gpu=False)),
        *(variant.name for variant in chunked(16, offload=True, chunk_sizes=[8], groups=[2])),
        f"{KEPT}, narrow K/V gradients",
    ]
    assert {OFFLOADED, "the paper's chunk loop", "chunked, chunks of 8"} <= set(names)
    rows = {(row["num_tokens"], row["variant"]): row for row in result["rows"]}
    assert list(rows) == [(num_tokens, name) for num_tokens in (40, 64) for name in names]
    for row in rows.values():
        assert row["wall_ratio"] > 0
        assert row["cpu_ratio"] > 0
        assert len(row["rounds"]) == result["num_repetitions"] == 2
        assert row["tokens_per_s"] == pytest.approx(row["num_tokens"] / row["median_wall_s"])
        assert 0 < row["mfu"] == row["mfu_needed"], "nothing is frozen"
        assert row["largest_gradient_difference"] < 1e-5
        assert (row["variant"] == PLANNED) == ("plan" in row)
    assert rows[64, BASELINE]["wall_ratio"] == 1
    assert rows[64, PLANNED]["plan"].startswith("auto: chunk_size=512, "), "the least that is planned"


def test_attention(folder: Path) -> None:
    rows = result_of("attention", folder)["rows"]
    errors = {(row["backend"], row["dtype"], row["case"]): row for row in rows if "forward_flops" not in row}
    for dtype in ("float32", "bfloat16"):
        assert errors["cpu_flash", dtype, "with a prefix"]["passed"]
        assert "window" in errors["cpu_flash", dtype, "window"]["why_not"]
        assert errors["math", dtype, "window"]["passed"]
    assert [row["case"] for row in rows if row["backend"] == "varlen"] == ["first chunk"] * 2, "once a dtype"
    assert {row["backend"] for row in rows if "forward_flops" in row} == {"cpu_flash", "math"}


def test_long_tail(folder: Path) -> None:
    result = result_of("long-tail", folder)
    num_tokens, rows = result["data"]["num_tokens"], {row["variant"]: row for row in result["rows"]}
    base = "padded, 8 rows"
    assert list(rows) == [base, "padded, 1 row", "token streams, nothing retained", "token streams"]
    assert rows[base]["wall_speedup"] == rows[base]["cpu_speedup"] == 1
    for name, row in rows.items():
        assert row["outcome"] == "ran"
        assert row["largest_gradient_difference"] < 1e-5
        assert (row["tokens_padded"] > 0) == (name == base)
    assert rows["token streams, nothing retained"]["tokens_recomputed"] == num_tokens
    assert rows["token streams"]["tokens_recomputed"] == 0
    assert rows[base]["tokens_recomputed"] == num_tokens + rows[base]["tokens_padded"]


def test_memory(folder: Path) -> None:
    rows = [row for row in result_of("memory", folder)["rows"] if "bytes_per_token" in row]
    per_token = {row["variant"]: row["bytes_per_token"] for row in rows}
    assert 0 < per_token[TWICE] < per_token[BASELINE]


def test_spaco(folder: Path) -> None:
    rows = {row["variant"]: row for row in result_of("spaco", folder)["rows"]}
    assert len(rows) == 6
    assert rows["2 chunks"]["of_exact"] < rows["16 chunks"]["of_exact"]
    assert "of_parts" not in rows["exact step"]


def test_sharding(folder: Path) -> None:
    result = result_of("sharding", folder)
    assert (result["num_ranks"], result["lengths"]) == (2, [64, 32])
    assert len(result["rows"]) == 6
    for row in result["rows"]:
        assert row["all_ranks_alike"]
        assert row["gathers"] == 3, "the unit of two layers twice, the rest once"
        assert row["gathered_bytes"] > 1.5 * result["parameter_bytes"]
        plain = next(r for r in result["rows"] if r["training"] == row["training"])
        assert {**row, "variant": ""} == {**plain, "variant": ""}, "chunks cost no collective"


def test_profile(folder: Path) -> None:
    result = result_of("profile", folder)
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    assert any(event.get("name") == "aten::mm" for event in events)
    assert 0 < result["kernel_s"] < result["profiled_s"]
    assert sum(row["share"] for row in result["rows"]) <= 1 + 1e-9
    assert result["rows"] == sorted(result["rows"], key=lambda row: -row["seconds"])


def test_max_length(folder: Path) -> None:
    rows = result_of("max-length", folder)["rows"]
    assert [(row["fits"], row["fails"], row["out_of_time"]) for row in rows] == [(64, None, False)] * 4
