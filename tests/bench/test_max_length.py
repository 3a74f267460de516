"""The search finds the longest, on trials of any cost."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from chunkdist.bench import max_length, memory, rounds
from chunkdist.bench.max_length import Found, longest
from chunkdist.bench.sizes import SIZES


@pytest.mark.parametrize("most", [0, 16, 31, 100, 1000, 1007, 5000])
@pytest.mark.parametrize("start", [1, 64, 10_000])
def test_the_longest_is_found(most: int, start: int) -> None:
    tried: list[int] = []

    def fits(num_tokens: int) -> bool:
        tried.append(num_tokens)
        return num_tokens <= most

    found = longest(fits, start=start, step=16, limit=4100, is_late=lambda: False)
    assert all(length % 16 == 0 and 0 < length <= 4096 for length in tried)
    assert len(set(tried)) == len(tried)
    assert found.fits <= most
    assert found.fits in (0, *tried)
    assert not found.out_of_time
    if most >= 4096:
        assert found == Found(fits=4096, fails=None, out_of_time=False)
    else:
        assert found.fails is not None
        assert most < found.fails <= found.fits + max(16, found.fits // 16)


def test_a_search_that_is_late_says_so() -> None:
    answers = iter([False, False, True])
    found = longest(lambda length: True, start=16, step=16, limit=4096, is_late=lambda: next(answers))
    assert found == Found(fits=32, fails=None, out_of_time=True)


def test_smoke(tmp_path: Path) -> None:
    file = tmp_path / "max-length.json"
    given = ["--smoke", "--only", "checkpointing", "--start", "512", "--json", str(file)]
    assert max_length.main(given) == 0
    result = json.loads(file.read_text())
    (row,) = result["rows"]
    assert 0 < row["fits"] < row["fails"]
    usable = int((result["memory_gib"] - 1) * 2**30)
    way = memory.Way(name="checkpointing")
    peaks = [memory.peak_bytes(way, memory.SMALL, row[length])[0] for length in ("fits", "fails")]
    weights = memory.weight_bytes(memory.SMALL)
    assert weights + peaks[0] <= usable < weights + peaks[1], "counted with all layers"


def test_running_out_of_memory_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = SIZES["smoke"]
    model, way = sizes.model("cpu", torch.float32), max_length.ways(16)[0]
    fits = max_length.on_cuda(model, sizes, way, "cpu")
    assert fits(32)
    forward = model.forward

    def small(input_ids: torch.Tensor, **kwargs: object) -> object:
        if input_ids.shape[1] > 32:
            raise torch.OutOfMemoryError
        return forward(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(model, "forward", small)
    assert [fits(length) for length in (32, 48)] == [True, False]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_fails_otherwise_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(max_length, "attempt", lambda *args, **kwargs: rounds.Attempt(why_not="failed: no"))
    fits = max_length.on_cuda(None, SIZES["smoke"], max_length.ways(16)[0], "cpu")
    with pytest.raises(RuntimeError, match="16 tokens: failed: no"):
        fits(16)


def test_what_a_stopped_search_leaves_is_a_lower_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is stopped in its fourth trial: of 128, 256 and 512 tokens, the last do not fit."""
    tried: list[int] = []

    def counted(*args: Any) -> Any:
        def fits(num_tokens: int) -> bool:
            tried.append(num_tokens)
            if len(tried) == 4:
                raise KeyboardInterrupt
            return num_tokens < 512

        return fits

    monkeypatch.setattr(max_length, "counted", counted)
    file = tmp_path / "max-length.json"
    with pytest.raises(KeyboardInterrupt):
        max_length.main(["--smoke", "--only", "checkpointing", "--json", str(file)])
    result = json.loads(file.read_text())
    (row,) = result["rows"]
    assert (row["fits"], row["fails"], row["out_of_time"]) == (256, 512, True)
    assert list(row["seconds_by_length"]) == ["128", "256", "512"]
    assert result["partial"]
    assert "at least 256" in max_length.table(result)


def test_each_trial_is_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """With host offload, too, whose second step is for its time alone."""
    sizes = SIZES["smoke"]
    model, way = sizes.model("cpu", torch.float32), max_length.ways(16)[-1]
    assert way.config is not None
    assert way.config.offload == "host"
    real, lengths = rounds.prepared, []

    @contextmanager
    def counting(*args: Any, **kwargs: Any) -> Iterator[Any]:
        with real(*args, **kwargs) as run:
            yield lambda ids: (lengths.append(ids.shape[1]), run(ids))

    monkeypatch.setattr(rounds, "prepared", counting)
    assert max_length.on_cuda(model, sizes, way, "cpu")(32)
    assert lengths == [32]


def test_a_search_that_ran_out_of_time_gives_a_lower_bound() -> None:
    late = {"way": "late", "fits": 131072, "fails": None, "out_of_time": True}
    rows = [late, {"way": "in time", "fits": 4096, "fails": 8192, "out_of_time": False}]
    lines = max_length.table({"memory_gib": 24, "method": "", "rows": rows}).splitlines()[1:4]
    assert lines[1].split() == ["late", "at", "least", "131,072", "-"]
    assert lines[2].split() == ["in", "time", "4,096", "8,192"]
    assert len({len(line) for line in lines}) == 1, "columns"


@pytest.mark.parametrize(
    "given",
    [
        *(["--only", "no-such"], ["--limit", "8"], ["--start", "0"], ["--whole-card"]),
        *(["--memory-gib", "0"], ["--memory-gib", "nan"], ["--seconds", "0"], ["--device", "tpu"]),
        *(["--json", "."], ["--json", "no-such-folder/x.json"]),
    ],
)
def test_bad_options(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        max_length.main(["--smoke", *given])
    assert "error" in capsys.readouterr().err
