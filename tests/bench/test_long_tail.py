"""An epoch of long-tailed data: wrong gradients are refused, and TRL's rows are whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from chunkdist import ChunkConfig
from chunkdist.bench import long_tail
from chunkdist.bench.long_tail import BASELINE, STREAMS, Epoch, packed_by_trl, tokens_recomputed
from tests.helpers.models import packed_batch


def test_wrong_gradients_are_no_figure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Few micro-batches: of other tokens, and so of other gradients."""
    real = long_tail.epochs_of

    def few(*args: Any) -> list[Epoch]:
        base, *_, last = real(*args)
        return [base, Epoch(name=last.name, micro_batches=last.micro_batches[:1], config=last.config)]

    monkeypatch.setattr(long_tail, "epochs_of", few)
    assert long_tail.main(["--smoke"]) == 1
    out = capsys.readouterr().out
    lines = {line.split(" | ")[0].strip("| "): line for line in out.splitlines() if line.startswith("| ")}
    assert "wrong gradients: they differ by" in lines[STREAMS]
    assert " ran " in lines[BASELINE]


def test_trl_packs_every_sequence_once() -> None:
    rows = packed_by_trl([5, 3, 2, 9, 1])
    assert sorted(index for row in rows for index in row) == [0, 1, 2, 3, 4]
    assert len(rows) < 5


def test_tokens_that_are_run_again() -> None:
    """A stream of 10 tokens in chunks of 4: the last chunks are retained."""
    inputs = {"input_ids": torch.zeros(1, 10), "position_ids": packed_batch([10])["position_ids"]}
    epoch = Epoch(name="", micro_batches=[inputs], config=ChunkConfig(chunk_size=4))
    assert [tokens_recomputed(epoch, 4, num) for num in (0, 1, 3)] == [10, 8, 0]
    plain = Epoch(name="", micro_batches=[{"input_ids": torch.zeros(2, 7)}])
    assert tokens_recomputed(plain, 4, 0) == 14
