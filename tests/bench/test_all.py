"""One command runs all; one that fails does not keep the others from running."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from chunkdist.bench import BENCHMARKS, all


def test_all_run_and_the_exit_status_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert set(all.NAMES) == BENCHMARKS.keys() - {"all", "compare"}
    commands: list[list[str]] = []
    for failing, status in ((None, 0), ("spaco", 1)):

        def run(command: list[str], check: bool, failing: str | None = failing) -> SimpleNamespace:
            commands.append(command)
            return SimpleNamespace(returncode=int(failing in command))

        monkeypatch.setattr(all.subprocess, "run", run)
        assert all.main(["--device", "cuda", "--json-dir", str(tmp_path / "new")]) == status
    assert len(commands) == 2 * len(all.NAMES)
    names = [command[command.index("bench") + 1] for command in commands]
    assert names[0] == "attention", "where a backend is wrong, no figure that follows is worth anything"
    for name, command in zip(names, commands, strict=True):
        assert f"{tmp_path}/new/{name}.json" in command
        assert ("cuda" in command) == (name != "memory")
    assert capsys.readouterr().out.endswith("failed: spaco\n")
