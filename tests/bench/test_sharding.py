"""The sharding benchmark starts its ranks and counts; the counting itself is tested in tests/distributed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from chunkdist.bench import sharding
from chunkdist.bench.sharding_ranks import ENGINES, Case, write_counts
from chunkdist.bench.sizes import SIZES


def test_smoke(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "sharding.json"
    assert sharding.main(["--smoke", "--only", "units", "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    assert (result["num_ranks"], result["lengths"]) == (2, [64, 32])
    assert len(result["rows"]) == 6
    for row in result["rows"]:
        assert row["all_ranks_alike"]
        assert row["gathers"] == 3, "the unit of two layers twice, the rest once"
        assert row["gathered_bytes"] > 1.5 * result["parameter_bytes"]
        plain = next(r for r in result["rows"] if r["training"] == row["training"])
        assert {**row, "way": ""} == {**plain, "way": ""}, "chunks cost no collective"
    assert "FSDP2, units of 2 layers, LoRA, 8 chunks" in capsys.readouterr().out


def test_what_ranks_have_ended_is_written_and_all_end_when_one_is_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are of the cases that every rank has ended."""
    cases = list(sharding.cases(64, 8, has_deepspeed=False, only="DDP"))[:3]

    class Process:
        killed = False

        def is_alive(self) -> bool:
            return True

        def kill(self) -> None:
            self.killed = True

    class Ranks:
        processes = (Process(), Process())
        num_joins = 0

        def join(self, timeout: float) -> bool:
            self.num_joins += 1
            if self.num_joins == 3:
                raise KeyboardInterrupt
            for rank in (0, 1):
                write_counts([{}] * (2 * self.num_joins - 1 - rank), rank, self.folder)
            return False

    ranks = Ranks()

    def started(run: Any, **kwargs: Any) -> Ranks:
        ranks.folder = run.keywords["folder"]
        return ranks

    monkeypatch.setattr(sharding, "start_processes", started)
    written: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        sharding.measure(
            cases,
            SIZES["smoke"],
            [64, 32],
            device="cpu",
            write=lambda found: written.append(len(found["rows"])),
        )
    assert written == [2], "of 1 and 0 cases, then of 3 and 2"
    assert all(process.killed for process in ranks.processes)


def test_every_engine_has_its_ways() -> None:
    found = list(sharding.cases(100, 30, has_deepspeed=True))
    assert {case.engine for case in found} == set(ENGINES)
    assert {case.way for case in found if case.engine == "DDP"} == {"plain", "1 chunk", "4 chunks"}
    assert not any(case.engine.startswith("ZeRO") for case in sharding.cases(100, 30, has_deepspeed=False))


def test_a_rows_figures() -> None:
    case = Case(engine="ZeRO-3", way="1 chunk", chunk_size=4, lora=False)

    def traffic(count: int, whole: int, sent: int) -> dict[str, int]:
        return {"count": count, "whole_bytes": whole, "sent_bytes": sent}

    one: dict[str, Any] = {"all-gather": traffic(2, 10, 5), "all-reduce": traffic(1, 4, 4)}
    other = {**one, "reduce-scatter": traffic(1, 6, 3)}
    row = sharding.row_of(case, [other, one])
    assert not row["all_ranks_alike"]
    assert (row["gathers"], row["gathered_bytes"]) == (2, 10)
    assert (row["reductions"], row["reduced_bytes"], row["sent_bytes"]) == (2, 10, 12)
    assert sharding.row_of(case, [one, one])["all_ranks_alike"]


@pytest.mark.parametrize("given", [["--device", "cuda"], ["--device", "cuda:1"], ["--only", "no-such"]])
def test_bad_options(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        sharding.main(["--smoke", *given])
    assert "error" in capsys.readouterr().err
