"""The wheel holds all that the `chunkdist` command needs: built, unpacked elsewhere, and run outside of the
checkout."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.helpers.tiny_run import TEXTS, write_rows

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the wheel has been installed."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "--quiet"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run([*pip, *build], check=True)
    (wheel,) = folder.glob("chunkdist-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(folder / "site"), str(wheel)], check=True)
    return folder / "site"


def run(site: Path, folder: Path, *arguments: str) -> str:
    """What the installed command prints, in `folder`."""
    done = subprocess.run(
        [sys.executable, str(site / "bin" / "chunkdist"), *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_commands_run_outside_of_the_checkout(site: Path, tmp_path: Path, tiny_model: Path) -> None:
    where = [sys.executable, "-c", "import chunkdist; print(chunkdist.__file__)"]
    env = {**os.environ, "PYTHONPATH": str(site)}
    found = subprocess.run(where, cwd=tmp_path, env=env, capture_output=True, text=True, check=True).stdout
    assert Path(found.strip()).is_relative_to(site)
    assert "attention math" in run(site, tmp_path, "env")
    options = {
        "model_name_or_path": str(tiny_model),
        "from_scratch": True,
        "dataset_name": str(write_rows(tmp_path / "rows.jsonl", TEXTS)),
        "max_length": 256,
        "chunk_size": 16,
        "use_cpu": True,
        "output_dir": str(tmp_path / "out"),
        "report_to": "none",
    }
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(options))
    assert "longest length that fits" in run(site, tmp_path, "plan", str(config))
    assert "gradients" in run(site, tmp_path, "check", str(config))
