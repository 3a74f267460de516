"""A variant without room, with wrong gradients, or that fails is told and left out."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from chunkdist.bench import rounds, step
from chunkdist.bench.models import SIZES
from chunkdist.bench.timing import largest, ratios, step_flops
from chunkdist.bench.variants import BASELINE, Variant, baselines

NAN = math.nan
FEW = ["--smoke", "--repetitions", "1", "--only", "plain", "kept", BASELINE]
Change = Callable[[Any, Variant, Tensor], None]


@pytest.fixture(autouse=True)
def three_variants(monkeypatch: pytest.MonkeyPatch) -> None:
    """The baseline, the plain model and one in chunks."""
    real = step.baselines
    monkeypatch.setattr(step, "baselines", lambda *args, **settings: real(*args, **settings)[:2])


def in_each_step(monkeypatch: pytest.MonkeyPatch, change: Change) -> None:
    """`change` of the model, the variant and the tokens, after each step."""
    real = rounds.prepared

    @contextmanager
    def prepared(model: Any, variant: Variant, *, on_gpu: bool) -> Iterator[Any]:
        with real(model, variant, on_gpu=on_gpu) as run:

            def changed(ids: Tensor) -> Tensor:
                loss: Tensor = run(ids)
                change(model, variant, ids)
                return loss

            yield changed

    monkeypatch.setattr(rounds, "prepared", prepared)


def outcomes(file: Path) -> dict[tuple[str, int], str]:
    rows = json.loads(file.read_text())["rows"]
    return {(row["variant"], row["num_tokens"]): row["outcome"] for row in rows}


def test_a_variant_without_room_is_left_out_at_longer_lengths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, int]] = []

    def small_memory(model: Any, variant: Variant, ids: Tensor) -> None:
        seen.append((variant.name, ids.shape[1]))
        if variant.name == "plain" and ids.shape[1] > 16:
            raise torch.OutOfMemoryError

    in_each_step(monkeypatch, small_memory)
    file = tmp_path / "step.json"
    assert step.main([*FEW, "--num-tokens", "16", "32", "48", "--json", str(file)]) == 0
    found = outcomes(file)
    assert [found["plain", length] for length in (16, 32, 48)] == ["ran", *["out of memory"] * 2]
    assert all(found[BASELINE, length] == "ran" for length in (16, 32, 48))
    assert ("plain", 48) not in seen


def test_a_variant_whose_room_is_gone_after_the_warm_up_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The baseline too: what is left has then no ratio at this length, and runs on."""
    turns: list[str] = []

    def gone(model: Any, variant: Variant, ids: Tensor) -> None:
        turns.append(variant.name)
        if variant.name == BASELINE and turns.count(BASELINE) == 3:
            raise torch.OutOfMemoryError

    in_each_step(monkeypatch, gone)
    file = tmp_path / "step.json"
    assert step.main([*FEW, "--repetitions", "2", "--json", str(file)]) == 0
    rows = {row["variant"]: row for row in json.loads(file.read_text())["rows"]}
    assert rows[BASELINE]["outcome"] == "out of memory"
    assert rows["plain"]["outcome"] == "ran"
    assert "wall_ratio" not in rows["plain"]
    assert len(rows["plain"]["rounds"]) == 2


def test_a_variant_that_fails_otherwise_says_so_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As one whose kernel, package or host memory is not to be had; the exit status tells."""

    def no_kernel(model: Any, variant: Variant, ids: Tensor) -> None:
        if variant.name == "plain":
            raise RuntimeError("No available kernel.\nAborting execution.")

    in_each_step(monkeypatch, no_kernel)
    file = tmp_path / "step.json"
    assert step.main([*FEW, "--json", str(file)]) == 1
    said = "failed: RuntimeError: No available kernel. Aborting execution."
    assert outcomes(file)["plain", 64] == said
    assert {outcome for (name, _), outcome in outcomes(file).items() if name != "plain"} == {"ran"}
    assert said in capsys.readouterr().out


def test_a_variant_with_wrong_gradients_is_no_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the last parameter, which `max` passes over; `None`: it has none."""
    for wrong, said in ((NAN, "by nan"), (1.5, "5.0e-01, more than 0.001"), (None, "1 parameters")):

        def change(model: Any, variant: Variant, ids: Tensor, wrong: float | None = wrong) -> None:
            if variant.name == "plain" and ids.shape[1] > 40:
                last = list(model.parameters())[-1]
                last.grad = None if wrong is None else last.grad * wrong

        with monkeypatch.context() as patch:
            in_each_step(patch, change)
            file = tmp_path / "step.json"
            assert step.main([*FEW, "--num-tokens", "40", "48", "64", "--json", str(file)]) == 1
        found = outcomes(file)
        assert found["plain", 40] == "ran"
        assert found["plain", 48] == found["plain", 64]
        assert found["plain", 48].startswith("wrong gradients: ")
        assert said in found["plain", 48]
        assert {outcome for (name, _), outcome in found.items() if name != "plain"} == {"ran"}


def test_a_wrong_baseline_is_what_nothing_is_compared_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(model: Any, variant: Variant, ids: Tensor) -> None:
        if variant.name == BASELINE:
            list(model.parameters())[-1].grad.fill_(NAN)

    in_each_step(monkeypatch, change)
    file = tmp_path / "step.json"
    assert step.main([*FEW, "--json", str(file)]) == 1
    found = {name: outcome for (name, _), outcome in outcomes(file).items()}
    assert found.pop(BASELINE).startswith("wrong gradients: ")
    assert set(found.values()) == {"ran"}


def test_what_a_stopped_run_leaves_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is stopped in the second round, after the baseline's turn is over."""
    turns: list[str] = []

    def stop(model: Any, variant: Variant, ids: Tensor) -> None:
        turns.append(variant.name)
        if turns.count("plain") == 3:
            raise KeyboardInterrupt

    in_each_step(monkeypatch, stop)
    file = tmp_path / "step.json"
    with pytest.raises(KeyboardInterrupt):
        step.main([*FEW, "--repetitions", "2", "--json", str(file)])
    result = json.loads(file.read_text())
    assert result["partial"]
    assert all(row["wall_ratio"] > 0 for row in result["rows"]), "of the rounds that both have"


def test_half_precision_is_allowed_more() -> None:
    sizes = SIZES["smoke"]
    assert rounds.allowed_difference(sizes.model("cpu", torch.float32)) == 1e-3
    assert rounds.allowed_difference(sizes.model("cpu", torch.bfloat16)) == 0.3
    nothing = {"a": torch.zeros(3)}
    assert rounds.largest_difference(nothing, nothing) == 0, "a gradient of zeros is right"
    assert rounds.largest_difference({"a": torch.ones(3)}, nothing) == math.inf
    for figures in ([NAN, 1.0], [1.0, NAN], [math.inf, NAN]):
        assert math.isnan(largest(iter(figures)))
    assert largest([1.0, math.inf]) == math.inf


def test_what_others_are_compared_with_waits_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the device it would be in the peaks of those that follow."""
    copied: list[Any] = []
    real = Tensor.to
    monkeypatch.setattr(
        Tensor, "to", lambda x, *args, **options: copied.append(args) or real(x, *args, **options)
    )
    sizes = SIZES["smoke"]
    model, ids = sizes.model("cpu", torch.float32), sizes.tokens("cpu")
    here = rounds.Rounds(model, ids, baselines(16, on_gpu=False)[:1], lambda here: None)
    copied.clear()
    here.run(1)
    assert copied.count(("cpu",)) == len(list(model.parameters()))


def test_the_order_of_the_variants_rotates() -> None:
    sizes, turns = SIZES["smoke"], list[str]()
    model, ids = sizes.model("cpu", torch.float32), sizes.tokens("cpu")
    here = rounds.Rounds(model, ids, baselines(16, on_gpu=False)[:2], lambda here: None)
    real = here._turn

    def turn(variant: Variant, *, is_first: bool) -> None:
        turns.append(variant.name)
        real(variant, is_first=is_first)

    here._turn = turn  # type: ignore[method-assign]
    here.run(3)
    assert turns == [BASELINE, "plain", "plain", BASELINE, BASELINE, "plain"]


def test_utilisation_is_of_the_larger_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the beginning and of the end; `None`: the device is lost by then."""
    sizes = replace(SIZES["smoke"], num_tokens=16)
    flops = step_flops(sizes.model("cpu", torch.float32), 16)["by_convention"]
    for at_the_end, larger in ((200.0, 200.0), (50.0, 100.0), (None, 100.0)):
        answers = iter([100.0, at_the_end])

        def rate(device: str, dtype: torch.dtype, answers: Any = answers) -> float:
            if (found := next(answers)) is None:
                raise RuntimeError("CUDA error")
            return float(found)

        monkeypatch.setattr(step, "matmul_flops", rate)
        file = tmp_path / "step.json"
        step.main(
            ["--smoke", "--repetitions", "1", "--num-tokens", "16", "--only", "plain", "--json", str(file)]
        )
        (row,) = json.loads(file.read_text())["rows"]
        assert row["mfu"] == pytest.approx(flops / row["median_wall_s"] / larger)


def test_frozen_matrices_have_no_gradient_to_compute() -> None:
    lora_model = replace(SIZES["smoke"], lora_rank=2).model("cpu", torch.float32)
    flops = step_flops(lora_model, 10)
    sizes = SIZES["smoke"]
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * sizes.intermediate_size
    frozen = sizes.num_layers * layer + 32 * sizes.vocab_size
    assert flops["by_convention"] - flops["needed"] == 2 * 10 * frozen


def test_a_median_of_ratios_within_rounds() -> None:
    """On a machine that is slow for a round; the last round of the one has not ended."""
    found = ratios("wall_ratio", [1.1, 9.0, 2.4], [1.0, 10.0, 2.0, 5.0])
    assert found["wall_ratio"] == pytest.approx(1.1)
    assert found["wall_ratio_lowest"] == pytest.approx(0.9)
    assert found["wall_ratio_highest"] == pytest.approx(1.2)
    assert ratios("wall_ratio", [1.0], []) == {}


def test_bad_options(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for given, said in (
        (["--memory-gib", "24"], "leave it out, or write --device cuda"),
        (["--device", "cuda"], "torch sees no GPU on this machine"),
        (["--device", "tpu"], "write cpu, cuda, or cuda and its index"),
        (["--extras", "no-such"], "invalid choice"),
        (["--only", "no such"], "write words of gradient checkpointing"),
        (["--num-layers", "0"], "write an integer >= 1"),
        (["--num-tokens", "64", "0"], "write an integer >= 1"),
        (["--json", "/no/such/folder/x.json"], "its folder does not exist"),
        (["--flash-impl", "FA9"], "this torch knows"),
        (["--flash-impl", "FA3"], "is not to be had here"),  # no CPU has its package
    ):
        with pytest.raises(SystemExit):
            step.main(["--smoke", *given])
        assert said in capsys.readouterr().err
