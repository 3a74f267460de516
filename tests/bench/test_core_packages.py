"""All that `bench all` runs on a GPU's machine needs torch, transformers and peft, and what those need."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from chunkdist.bench.jobs import JOBS
from tests.helpers.tiny_run import ROOT

OTHERS = ("trl", "datasets", "deepspeed", "wandb", "matplotlib", "rich", "bitsandbytes", "flash_attn")
SMALLER = {
    "attention": [],
    "gradient-error": ["--num-tokens", "32", "--chunk-sizes", "16"],
    "long-tail": ["--without-simulation"],
    "max-length": ["--only", "checkpointing", "--limit", "128"],
    "offload": ["--repetitions", "1"],
    "overhead": ["--chunk-sizes", "16"],
    "profile": ["--trace", "trace.json"],
    "sharding": ["--only", "DDP"],
    "spaco": ["--repetitions", "1"],
    "step": ["--repetitions", "1"],
}
SCRIPT = f"""
import importlib.util, sys
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.split(".")[0] in {OTHERS} else real(name, *rest)

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {OTHERS}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, NotInstalled())
if __name__ == "__main__":  # ranks come here, too
    from chunkdist.cli.main import main

    for name, options in {SMALLER!r}.items():
        status = main(["bench", name, "--smoke", *options])
        assert status == 0, (name, status)
        print("ended:", name)
"""


def test_benchmarks_run_with_few_packages(tmp_path: Path) -> None:
    assert SMALLER.keys() == {job.name for job in JOBS}
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for name in SMALLER:
        assert f"ended: {name}\n" in done.stdout
    assert "TRL's packing" not in done.stdout
