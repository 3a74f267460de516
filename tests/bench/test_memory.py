"""Figures for all layers follow from few only where layers are alike."""

from __future__ import annotations

import pytest

from chunkdist.bench import memory


def test_layers_that_differ_are_not_extrapolated() -> None:
    memory.check_layers_are_alike("x", {8: 10, 12: 20, 16: 30})
    with pytest.raises(RuntimeError, match="run all of them"):
        memory.check_layers_are_alike("x", {8: 10, 12: 20, 16: 31})
    assert memory.of_all_layers({8: 10, 12: 18}, 32) == 58


def test_lengths_are_checked(capsys: pytest.CaptureFixture[str]) -> None:
    for lengths in (["64"], ["64", "32"]):
        with pytest.raises(SystemExit):
            memory.main(["--smoke", "--num-tokens", *lengths])
        assert "ascending" in capsys.readouterr().err
