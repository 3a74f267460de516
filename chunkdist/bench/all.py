"""All benchmarks that a result is written of, one after another, each in a process of its own.

Backends are checked first: where one is wrong, no figure that follows is worth anything.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

NAMES = ("attention", "step", "spaco", "long-tail", "profile", "max-length", "sharding", "memory")


def main(arguments: Sequence[str]) -> int:
    """Runs the benchmarks; returns the exit status, which is 1 when one has failed."""
    parser = argparse.ArgumentParser(prog="chunkdist bench all", description="All benchmarks in turn.")
    parser.add_argument("--json-dir", type=Path, required=True, metavar="DIR", help="where the results go")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--smoke", action="store_true", help="tiny, on a CPU: the figures mean nothing")
    options = parser.parse_args(arguments)
    options.json_dir.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in NAMES:
        print(f"== {name}", flush=True)
        file = str(options.json_dir / f"{name}.json")
        command = [sys.executable, "-m", "chunkdist.cli.main", "bench", name, "--json", file]
        command += ["--device", options.device] if name != "memory" else []
        command += ["--trace", str(options.json_dir / "trace.json.gz")] if name == "profile" else []
        command += ["--smoke"] if options.smoke else []
        if subprocess.run(command, check=False).returncode != 0:
            failed.append(name)
    print(f"failed: {', '.join(failed)}" if failed else "all ended")
    return 1 if failed else 0
