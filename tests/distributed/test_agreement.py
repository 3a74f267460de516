"""One rank of a machine asks, all ranks learn; a refusal reaches every rank."""

from __future__ import annotations

import pytest
from torch import distributed

from chunkdist.train.launch.agreement import agreed, any_rank
from tests.distributed.ranks import Ranks


def ask() -> list[object]:
    asked: list[int] = []

    def answer() -> int:
        asked.append(distributed.get_rank())
        return 7

    def refuse() -> int:
        raise ValueError("refused on rank 0")

    def break_down() -> int:
        raise KeyError("broken")

    said: list[object] = [agreed(answer), asked, any_rank(distributed.get_rank() == 1), any_rank(False)]
    for function in (refuse, break_down):
        try:
            agreed(function)
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


def test_ranks_learn_what_the_first_has_found(two_ranks: Ranks) -> None:
    first, second = two_ranks.run(ask)
    assert first == [7, [0], True, False, "ValueError: refused on rank 0", "KeyError: 'broken'"]
    assert second == [7, [], True, False, "ValueError: refused on rank 0", "RuntimeError: 'broken'"]


def test_one_process_asks_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")  # left over from another job
    assert agreed(lambda: 7) == 7
    assert any_rank(True)
    assert not any_rank(False)
