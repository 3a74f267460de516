"""The benchmarks run, in their smallest size, and write what docs are made of."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from chunkdist.bench import options, rounds, step
from chunkdist.bench.environment import hardware
from chunkdist.bench.sizes import SIZES
from chunkdist.bench.timing import step_flops
from chunkdist.bench.ways import BASELINE, KEPT, ON_HOST, PLANNED, Way, baselines, chunked


def test_smoke(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "step.json"
    given = ["--smoke", "--offload", "--num-tokens", "40", "64", "--chunk-sizes", "8", "--groups", "2"]
    given += ["--variants", "all", "--num-layers", "3"]
    assert step.main([*given, "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    ways = [
        *(way.name for way in baselines(16, on_gpu=False)),
        *(way.name for way in chunked(16, offload=True, chunk_sizes=[8], groups=[2])),
        "chunked, K/V kept, narrow K/V gradients",
    ]
    assert result["model"]["num_layers"] == 3
    assert "partial" not in result
    assert {"chunked, host offload", "the paper's chunk loop", "chunked, chunks of 8"} <= set(ways)
    assert result["command"].startswith("python -m chunkdist.bench.step --smoke")
    assert result["versions"]["torch"]
    assert result["hardware"]["cpu"]
    assert result["matmul_flops"] > 0
    assert list(result["summary"]) == ways
    assert [(row["num_tokens"], row["way"]) for row in result["rows"]] == [
        (num_tokens, way) for num_tokens in (40, 64) for way in ways
    ]
    assert len(result["steps"]) == 2 * 2 * len(ways)
    out = capsys.readouterr().out
    for row in result["rows"]:
        assert row["wall_ratio"] > 0
        assert row["cpu_ratio"] > 0
        assert row["tokens_per_s"] == pytest.approx(row["num_tokens"] / row["median_wall_s"])
        assert 0 < row["mfu"] == row["mfu_needed"], "nothing is frozen"
        assert row["largest_gradient_difference"] < 1e-5
        assert row["way"] in out
        assert (row["way"] == PLANNED) == ("plan" in row)
        if "plan" in row:
            assert row["plan"].startswith("auto: chunk_size=512, "), "the least that is planned"
            assert row["plan"] in out
    assert result["summary"][BASELINE]["wall_ratio"] == 1


def test_a_way_without_room_is_left_out_at_longer_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    real, seen = rounds.prepared, []

    @contextmanager
    def small_memory(model: Any, way: Way, *, on_gpu: bool) -> Iterator[Any]:
        with real(model, way, on_gpu=on_gpu) as run:

            def in_small_memory(ids: Tensor) -> Tensor:
                seen.append((way.name, ids.shape[1]))
                if way.method == "plain" and way.config is None and ids.shape[1] > 16:
                    raise torch.OutOfMemoryError
                return run(ids)

            yield in_small_memory

    monkeypatch.setattr(rounds, "prepared", small_memory)
    sizes, ways = SIZES["smoke"], baselines(16, on_gpu=False)[:2]
    settings = {"device": "cpu", "dtype": torch.float32, "num_rounds": 1}
    result = step.measure(sizes, ways, [16, 32, 48], report=print, write=lambda result: None, **settings)
    outcomes = {(row["way"], row["num_tokens"]): row["outcome"] for row in result["rows"]}
    assert [outcomes["plain", length] for length in (16, 32, 48)] == ["ran", *[step.OUT_OF_MEMORY] * 2]
    assert all(outcomes[BASELINE, length] == "ran" for length in (16, 32, 48))
    assert ("plain", 48) not in seen
    provided = {"hardware": hardware("cpu"), "num_repetitions": 1, "memory_gib": None}
    assert table_line(step.table({**result, **provided}), "plain", 1).endswith(step.OUT_OF_MEMORY)


def turns(monkeypatch: pytest.MonkeyPatch, fails: Any) -> list[tuple[str, int]]:
    """The way and the tokens of each turn; where `fails` of them gives something, that comes of it."""
    real, seen = rounds.attempt, list[tuple[str, int]]()

    def attempt(model: Any, ids: Tensor, way: Way, **settings: Any) -> Any:
        seen.append((way.name, ids.shape[1]))
        return fails(seen) or real(model, ids, way, **settings)

    monkeypatch.setattr(rounds, "attempt", attempt)
    return seen


def test_a_way_whose_room_is_gone_after_the_warm_up_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The baseline too: what is left has then no ratio at this length, and runs on."""
    gone = rounds.Attempt(why_not=rounds.OUT_OF_MEMORY)
    seen = turns(
        monkeypatch,
        lambda seen: gone if seen[-1] == (BASELINE, 32) and seen.count((BASELINE, 32)) == 2 else None,
    )
    ways = baselines(16, on_gpu=False)[:2]
    assert ways[0].name == BASELINE
    settings = {"device": "cpu", "dtype": torch.float32, "num_rounds": 3}
    result = step.measure(
        SIZES["smoke"], ways, [16, 32, 48], report=print, write=lambda result: None, **settings
    )
    outcomes = {(row["way"], row["num_tokens"]): row["outcome"] for row in result["rows"]}
    assert [outcomes[BASELINE, length] for length in (16, 32, 48)] == ["ran", *[step.OUT_OF_MEMORY] * 2]
    assert all(outcomes["plain", length] == "ran" for length in (16, 32, 48))
    assert seen.count((BASELINE, 32)) == 2
    assert (BASELINE, 48) not in seen
    steps = [entry["way"] for entry in result["steps"] if entry["num_tokens"] == 32]
    assert steps == ["plain"] * 3
    rows = {row["num_tokens"]: row for row in result["rows"] if row["way"] == "plain"}
    assert "wall_ratio" in rows[16]
    assert "wall_ratio" not in rows[32]
    assert [rows[length]["compared_with"] for length in (16, 32, 48)] == [BASELINE, BASELINE, "plain"]


def test_a_way_that_fails_otherwise_says_so_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As one whose kernel, package or host memory is not to be had; the exit status tells."""
    real = rounds.prepared

    @contextmanager
    def no_kernel(model: Any, way: Way, *, on_gpu: bool) -> Iterator[Any]:
        if way.name == "plain":
            raise RuntimeError("No available kernel.\nAborting execution.")
        with real(model, way, on_gpu=on_gpu) as run:
            yield run

    monkeypatch.setattr(rounds, "prepared", no_kernel)
    file = tmp_path / "step.json"
    given = ["--smoke", "--repetitions", "1", "--without", "paper", "host", "rebuilt", "group", "planned"]
    assert step.main([*given, "--json", str(file)]) == 1
    rows = {row["way"]: row["outcome"] for row in json.loads(file.read_text())["rows"]}
    said = "failed: RuntimeError: No available kernel. Aborting execution."
    assert rows == {BASELINE: "ran", "plain": said, "chunked, K/V kept": "ran"}
    assert said in capsys.readouterr().out


def test_what_a_stopped_run_leaves_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is stopped in the second round of the second length, after the baseline's turn is over."""

    def stop(seen: list[tuple[str, int]]) -> None:
        if seen.count((BASELINE, 64)) == 2:
            raise KeyboardInterrupt

    turns(monkeypatch, stop)
    file = tmp_path / "step.json"
    given = ["--smoke", "--num-tokens", "40", "64", "--repetitions", "2", "--without", "paper", "host"]
    with pytest.raises(KeyboardInterrupt):
        step.main([*given, "--json", str(file)])
    result = json.loads(file.read_text())
    assert result["partial"]
    rows = {(row["num_tokens"], row["way"]): row for row in result["rows"]}
    assert len(rows) == 2 * len({way for _, way in rows})
    assert all(row["wall_ratio"] > 0 for row in rows.values()), "of the rounds that both have"
    found = [entry["round"] for entry in result["steps"] if entry["num_tokens"] == 64]
    assert found.count(1) == len(rows) // 2
    assert 0 < found.count(2) < len(rows) // 2
    assert table_line(step.table(result), "plain", 1)


def test_a_run_stopped_in_its_only_step_has_the_peak_of_the_warm_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(rounds, "cost_of", stop)
    file = tmp_path / "step.json"
    with pytest.raises(KeyboardInterrupt):
        step.main(["--smoke", "--repetitions", "1", "--json", str(file)])
    result = json.loads(file.read_text())
    (row,) = result["rows"]
    assert (row["way"], row["outcome"]) == (BASELINE, step.WARMED_UP)
    assert {"peak_allocated_bytes", "largest_gradient_difference"} <= row.keys()
    assert result["partial"]
    assert step.WARMED_UP in table_line(step.table(result), BASELINE, 0)


def table_line(table: str, way: str, number: int) -> str:
    return [line for line in table.splitlines() if line.startswith(f"{way} ")][number]


@pytest.mark.parametrize(("at_the_end", "share"), [(200.0, 0.5), (50.0, 1.0), (None, 1.0)])
def test_utilisation_is_of_the_larger_rate(
    at_the_end: float | None, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the beginning and of the end; `None`: the device is lost by then."""
    seen: list[float] = []

    def rate(device: str, dtype: torch.dtype) -> float:
        if seen and at_the_end is None:
            raise RuntimeError("CUDA error")
        seen.append(at_the_end if seen else 100.0)  # type: ignore[arg-type]
        return seen[-1]

    monkeypatch.setattr(step, "matmul_flops", rate)
    settings: dict[str, Any] = {"device": "cpu", "dtype": torch.float32, "num_rounds": 1}
    ways = baselines(16, on_gpu=False)[:1]
    found = step.measure(SIZES["smoke"], ways, [16], report=print, write=lambda result: None, **settings)
    assert found["matmul_flops"] == max(seen)
    assert found["matmul_flops_measured"] == seen
    (row,) = found["rows"]
    sizes = replace(SIZES["smoke"], num_tokens=16)
    flops = step_flops(sizes.model("cpu", torch.float32), 16)
    assert row["mfu"] == pytest.approx(flops["by_convention"] / row["median_wall_s"] / 100 * share)
    assert found["summary"][BASELINE]["mfu_needed"] == row["mfu_needed"]
    head = {"hardware": hardware("cpu"), "num_repetitions": 1, "memory_gib": None}
    (line,) = [line for line in step.table({**head, **found}).splitlines() if line.startswith(BASELINE)]
    assert f"{row['mfu']:8.1%}{row['mfu_needed']:8.1%}" in line


def test_frozen_matrices_have_no_gradient_to_compute() -> None:
    lora_model = replace(SIZES["smoke"], lora_rank=2).model("cpu", torch.float32)
    flops = step_flops(lora_model, 10)
    sizes = SIZES["smoke"]
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * sizes.intermediate_size
    frozen = sizes.num_layers * layer + 32 * sizes.vocab_size
    assert flops["by_convention"] - flops["needed"] == 2 * 10 * frozen


def test_the_memory_limit_is_in_the_table() -> None:
    settings: dict[str, Any] = {"device": "cpu", "dtype": torch.float32, "num_rounds": 1}
    ways = baselines(16, on_gpu=False)[:1]
    found = step.measure(SIZES["smoke"], ways, [16], report=print, write=lambda result: None, **settings)
    head = {"hardware": hardware("cpu"), "num_repetitions": 1}
    assert "within 24 GiB (the allocator: 23)" in step.table({**head, **found, "memory_gib": 24.0})
    assert "GiB" not in step.table({**head, **found, "memory_gib": None})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--memory-gib", "24"], "leave it out, or write --device cuda"),
        (["--device", "cuda"], "torch sees no GPU on this machine"),
        (["--variants", "no-such"], "invalid choice"),
        (["--num-layers", "0"], "write an integer >= 1"),
    ],
)
def test_what_this_machine_cannot_do_is_one_line(
    given: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        step.main(["--smoke", *given])
    assert said in capsys.readouterr().err


def test_the_order_of_the_ways_rotates(tmp_path: Path) -> None:
    file = tmp_path / "step.json"
    step.main(["--smoke", "--repetitions", "3", "--json", str(file)])
    steps = json.loads(file.read_text())["steps"]
    firsts = [next(entry["way"] for entry in steps if entry["round"] == number) for number in (1, 2, 3)]
    assert firsts == [way.name for way in baselines(16, on_gpu=False)][:3]


def test_only_these_in_this_order(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One whose name begins with another's, say, without the other; the first is what ratios are to."""
    found: list[list[str]] = []

    def report(name: str, given: Any, options: Any, sizes: Any, ways: list[Way]) -> int:
        found.append([way.name for way in ways])
        return 0

    monkeypatch.setattr(step, "report_ways", report)
    assert step.main(["--smoke", "--only", KEPT, ON_HOST]) == 0
    assert found == [[KEPT, ON_HOST]]
    with pytest.raises(SystemExit):
        step.main(["--smoke", "--only", "no such"])
    assert "--only 'no such': that is no way here: write some of gradient check" in capsys.readouterr().err


def test_a_median_of_ratios_within_rounds() -> None:
    def made(number: int, way: str, wall_s: float) -> step.Step:
        return step.Step(
            num_tokens=8,
            round=number,
            way=way,
            wall_s=wall_s,
            cpu_s=wall_s,
        )

    other = "other"
    slow_machine = [made(1, BASELINE, 1.0), made(2, BASELINE, 10.0), made(3, BASELINE, 2.0)]
    steps = [*slow_machine, made(3, other, 2.4), made(1, other, 1.1), made(2, other, 9.0)]
    row = step._summary(steps, other, BASELINE)
    assert row["wall_ratio"] == pytest.approx(1.1)
    assert (row["wall_ratio_lowest"], row["wall_ratio_highest"]) == (pytest.approx(0.9), pytest.approx(1.2))
    assert row["median_wall_s"] == 2.4


@pytest.mark.parametrize(
    "arguments",
    [["--repetitions", "0"], ["--chunk-size", "-1"], ["--num-tokens", "64", "0"], ["--groups", "0"]],
)
def test_counts_are_checked(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        step.main(["--smoke", *arguments])
    assert "write an integer >= 1" in capsys.readouterr().err


def test_another_flash_attention_is_activated_or_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, said in (
        ("FA9", "this torch knows"),
        ("FA3", "is not to be had here"),
    ):  # no CPU has its package
        with pytest.raises(SystemExit):
            step.main(["--smoke", "--flash-impl", name])
        assert said in capsys.readouterr().err
    activated: list[str] = []
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", activated.append)
    parser = options.parser_of("step", "", "flash-impl")
    options.parsed(parser, ["--flash-impl", "FA3"])
    assert activated == ["FA3"]
