"""A way whose step is wrong, or takes the device with it, is told and left out."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from chunkdist.bench import gradient_error, long_tail, rounds, step
from chunkdist.bench.largest import largest
from chunkdist.bench.sizes import SIZES
from chunkdist.bench.ways import BASELINE, Way, baselines

NAN = math.nan
FEW = ["--smoke", "--repetitions", "1", "--without", "paper", "host", "rebuilt", "group", "planned"]


def after_each_step(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """`change` of the model, the way and the tokens."""
    real = rounds.prepared

    @contextmanager
    def prepared(model: Any, way: Way, *, on_gpu: bool) -> Iterator[Any]:
        with real(model, way, on_gpu=on_gpu) as run:

            def changed(ids: Tensor) -> Tensor:
                loss: Tensor = run(ids)
                change(model, way, ids)
                return loss

            yield changed

    monkeypatch.setattr(rounds, "prepared", prepared)


def outcomes(file: Path) -> dict[tuple[str, int], str]:
    rows = json.loads(file.read_text())["rows"]
    return {(row["way"], row["num_tokens"]): row["outcome"] for row in rows}


@pytest.mark.parametrize("figures", [[NAN, 1.0], [1.0, NAN], [math.inf, NAN]])
def test_no_number_is_the_largest(figures: list[float]) -> None:
    assert math.isnan(largest(iter(figures)))
    assert largest([1.0, math.inf]) == math.inf


@pytest.mark.parametrize("wrong", [NAN, 1.5, None])
def test_a_way_with_wrong_gradients_is_no_figure(
    wrong: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the last parameter, which `max` passes over; `None`: it has none."""

    def change(model: Any, way: Way, ids: Tensor) -> None:
        if way.method == "plain" and way.config is None and ids.shape[1] > 40:
            last = list(model.parameters())[-1]
            last.grad = None if wrong is None else last.grad * wrong

    after_each_step(monkeypatch, change)
    file = tmp_path / "step.json"
    assert step.main([*FEW, "--num-tokens", "40", "48", "64", "--json", str(file)]) == 1
    found = outcomes(file)
    assert found["plain", 40] == "ran"
    said = found["plain", 48]
    assert said == found["plain", 64]
    assert said.startswith("wrong gradients: ")
    assert {None: "1 parameters", 1.5: "5.0e-01, more than 0.001"}.get(wrong, "by nan") in said
    assert {outcome for (way, _), outcome in found.items() if way != "plain"} == {"ran"}


def test_a_wrong_baseline_is_what_nothing_is_compared_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(model: Any, way: Way, ids: Tensor) -> None:
        if way.name == BASELINE:
            list(model.parameters())[-1].grad.fill_(NAN)

    after_each_step(monkeypatch, change)
    file = tmp_path / "step.json"
    assert step.main([*FEW, "--num-tokens", "40", "--json", str(file)]) == 1
    found = {way: outcome for (way, _), outcome in outcomes(file).items()}
    assert found.pop(BASELINE).startswith("wrong gradients: ")
    assert set(found.values()) == {"ran"}


def test_half_precision_is_allowed_more() -> None:
    sizes = SIZES["smoke"]
    assert rounds.allowed_difference(sizes.model("cpu", torch.float32)) == 1e-3
    assert rounds.allowed_difference(sizes.model("cpu", torch.bfloat16)) == 0.3
    nothing = {"a": torch.zeros(3)}
    assert rounds.largest_difference(nothing, nothing) == 0, "a gradient of zeros is right"
    assert rounds.largest_difference({"a": torch.ones(3)}, nothing) == math.inf


def test_what_others_are_compared_with_waits_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the device it would be in the peaks of those that follow."""
    copied: list[Any] = []
    real = Tensor.to
    monkeypatch.setattr(
        Tensor, "to", lambda x, *args, **options: copied.append(args) or real(x, *args, **options)
    )
    sizes = SIZES["smoke"]
    model, ids = sizes.model("cpu", torch.float32), sizes.tokens("cpu")
    here = rounds.Rounds(model, ids, baselines(16, on_gpu=False)[:1], report=print, changed=lambda here: None)
    copied.clear()
    here.run(1)
    assert copied.count(("cpu",)) == len(list(model.parameters()))


def test_a_lost_device_is_told_and_what_ran_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after an illegal access: whatever is asked of the device then raises."""
    lost: list[bool] = []

    def change(model: Any, way: Way, ids: Tensor) -> None:
        if way.name == "plain" and ids.shape[1] == 48:
            lost.append(True)
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def empty_cache() -> None:
        if lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    after_each_step(monkeypatch, change)
    monkeypatch.setattr(torch.cuda, "empty_cache", empty_cache)
    file = tmp_path / "step.json"
    assert step.main([*FEW, "--num-tokens", "40", "48", "64", "--json", str(file)]) == 1
    found = outcomes(file)
    assert {found[way, 40] for way in (BASELINE, "plain", "chunked, K/V kept")} == {"ran"}
    assert found[BASELINE, 48] == "ran"
    assert found["plain", 48].endswith("illegal memory access was encountered; the device is lost")
    assert found["chunked, K/V kept", 48] == found[BASELINE, 64] == rounds.DEVICE_LOST
    assert len(found) == 9


def test_an_error_that_is_no_number_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    good = {"a": torch.ones(2), "b": torch.ones(2)}
    found = gradient_error.errors({**good, "b": torch.full((2,), NAN)}, good)
    assert math.isnan(found["worst"])
    assert math.isnan(found["error"])
    for module in (gradient_error, long_tail):
        monkeypatch.setattr(module, "write_result", lambda result, file: None)
        monkeypatch.setattr(module, "table", lambda result: "")
    for figure, status in ((NAN, 1), (1.0, 0)):
        rows = {"first": {"largest_gradient_difference": 0.0}, "a": {"largest_gradient_difference": figure}}
        made = {"largest_ratio_to_plain": figure, "summary": rows}
        for module in (gradient_error, long_tail):
            monkeypatch.setattr(module, "measure", lambda *args, made=made, **settings: made)
        assert gradient_error.main(["--smoke"]) == status
        assert long_tail.main(["--smoke", "--without-simulation"]) == status
