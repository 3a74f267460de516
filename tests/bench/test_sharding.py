"""The rows of the sharding benchmark; the counting itself is tested in tests/distributed."""

from __future__ import annotations

from typing import Any

import pytest

from chunkdist.bench import sharding
from chunkdist.bench.sharding import ENGINES, Case


def test_every_engine_has_its_variants() -> None:
    found = sharding.cases(100, 30, has_deepspeed=True)
    assert {case.engine for case in found} == set(ENGINES)
    names = [case.variant for case in found if case.engine == "DDP"]
    assert names == ["plain", "1 chunk", "4 chunks"] * 2, "full training, and LoRA"
    assert {case.engine for case in found if "leaves" in case.variant} == {"ZeRO-3"}
    assert not any(case.engine.startswith("ZeRO") for case in sharding.cases(100, 30, has_deepspeed=False))
    assert {case.engine for case in sharding.cases(100, 30, has_deepspeed=True, only="DDP")} == {"DDP"}


def test_a_rows_figures() -> None:
    case = Case(engine="ZeRO-3", variant="1 chunk", chunk_size=4, lora=False)

    def traffic(count: int, whole: int, sent: int) -> dict[str, int]:
        return {"count": count, "whole_bytes": whole, "sent_bytes": sent}

    one: dict[str, Any] = {"all-gather": traffic(2, 10, 5), "all-reduce": traffic(1, 4, 4)}
    other = {**one, "reduce-scatter": traffic(1, 6, 3)}
    row = sharding.row_of(case, [other, one])
    assert not row["all_ranks_alike"]
    assert (row["gathers"], row["gathered_bytes"]) == (2, 10)
    assert (row["reductions"], row["sent_bytes"]) == (2, 12)
    assert sharding.row_of(case, [one, one])["all_ranks_alike"]


def test_bad_options(capsys: pytest.CaptureFixture[str]) -> None:
    for given in (["--device", "cuda"], ["--device", "cuda:1"], ["--only", "no-such"], ["--num-ranks", "0"]):
        with pytest.raises(SystemExit):
            sharding.main(["--smoke", *given])
        assert "error" in capsys.readouterr().err
