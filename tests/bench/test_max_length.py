"""The search finds the longest, on trials of any cost."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from chunkdist.bench import max_length, rounds
from chunkdist.bench.max_length import longest


def test_the_longest_is_found() -> None:
    for most in (0, 16, 31, 100, 1000, 1007, 5000):
        for start in (1, 64, 10_000):
            check_search(most, start)


def check_search(most: int, start: int) -> None:
    tried: list[int] = []

    def fits(num_tokens: int) -> bool:
        tried.append(num_tokens)
        return num_tokens <= most

    *_, found = longest(fits, start=start, step=16, limit=4100, is_late=lambda: False)
    assert all(length % 16 == 0 and 0 < length <= 4096 for length in tried)
    assert len(set(tried)) == len(tried)
    assert found["fits"] <= most
    assert found["fits"] in (0, *tried)
    assert not found["out_of_time"]
    if most >= 4096:
        assert found == {"fits": 4096, "fails": None, "out_of_time": False}
    else:
        assert found["fails"] is not None
        assert most < found["fails"] <= found["fits"] + max(16, found["fits"] // 16)


def test_a_search_that_is_late_says_so() -> None:
    answers = iter([False, False, True])
    *_, found = longest(lambda length: True, start=16, step=16, limit=4096, is_late=lambda: next(answers))
    assert found == {"fits": 32, "fails": None, "out_of_time": True}


def searched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception) -> dict[str, Any]:
    """What a search writes on a model in which more than 32 tokens raise an error."""
    real = rounds.prepared

    @contextmanager
    def small(model: Any, variant: Any, *, on_gpu: bool) -> Iterator[Any]:
        with real(model, variant, on_gpu=on_gpu) as run:

            def step(ids: torch.Tensor) -> torch.Tensor:
                if ids.shape[1] > 32:
                    raise error
                return run(ids)

            yield step

    monkeypatch.setattr(rounds, "prepared", small)
    file = tmp_path / "max-length.json"
    assert max_length.main(["--smoke", "--only", "rebuilt", "--json", str(file)]) == 0
    result: dict[str, Any] = json.loads(file.read_text())
    return result


def test_running_out_of_memory_is_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (row,) = searched(monkeypatch, tmp_path, torch.OutOfMemoryError())["rows"]
    assert (row["fits"], row["fails"], row["out_of_time"]) == (32, 48, False)


def test_what_fails_otherwise_is_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="64 tokens: failed: RuntimeError: no kernel"):
        searched(monkeypatch, tmp_path, RuntimeError("no kernel"))
    result = json.loads((tmp_path / "max-length.json").read_text())
    assert result["partial"]
    assert result["rows"][0]["fits"] == 32, "what is known by then is there"


def test_bad_options(capsys: pytest.CaptureFixture[str]) -> None:
    for given, said in (
        ([], "write --device cuda, or see chunkdist plan"),
        (["--smoke", "--seconds", "0"], "write a number above 0"),
        (["--smoke", "--only", "no-such"], "no variant has it"),
        (["--smoke", "--chunk-size", "128"], "less than a chunk"),
    ):
        with pytest.raises(SystemExit):
            max_length.main(given)
        assert said in capsys.readouterr().err
