"""All that a GPU is wanted for, in parts of at most ten minutes (`chunkdist.bench.jobs`): each benchmark in a
process of its own.

One that fails, or takes longer than it may, is reported in its JSON, beside what it has written by then, and
the others go on. The exit status is 1 when any has failed. Backends are checked before anything else; where
one is wrong, no figure that follows is worth anything.

    python -m chunkdist.bench.all --json-dir DIR [--part 1] [--only WORD] [--device cuda] [--dry-run]
    python -m chunkdist.bench.all --json-dir DIR --smoke          # the same benchmarks in small, on a CPU
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import IO, Any

import torch

from chunkdist.bench import module_of
from chunkdist.bench.environment import provenance, write_result
from chunkdist.bench.jobs import JOBS, Job
from chunkdist.bench.options import check_device, parser_of

SMOKE_PATIENCE = 5
"""How many times its limit a job may take with `--smoke`, on whatever machine."""
LINES_KEPT = 60
"""Of a failed job's output, in its JSON."""


def command_of(job: Job, folder: Path, *, device: str, smoke: bool) -> list[str]:
    """The options of a job."""
    given = ["--smoke", *shlex.split(job.smoke)] if smoke else ["--device", device, *shlex.split(job.options)]
    file = str(folder / job.file)
    return [*(option.replace("{file}", file) for option in given), "--json", f"{file}.json"]


def run(job: Job, folder: Path, *, device: str, smoke: bool) -> dict[str, Any]:
    """Runs a job; what became of it: `seconds`, and `failed`, which says how, where it has."""
    file = folder / f"{job.file}.json"
    file.unlink(missing_ok=True)
    options = command_of(job, folder, device=device, smoke=smoke)
    limit_s = job.limit_s * (SMOKE_PATIENCE if smoke else 1)
    start = time.perf_counter()
    status, output = ended([sys.executable, "-m", module_of(job.name), *options], limit_s)
    file.with_name(f"{file.name}.part").unlink(missing_ok=True)  # it may have been stopped while it wrote
    row: dict[str, Any] = {"job": job.file, "seconds": time.perf_counter() - start}
    if status != 0:
        row["failed"] = f"stopped after {limit_s} s" if status is None else f"exit status {status}"
        report = {"failed": row["failed"], "output": output}
        written = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        command_given = provenance(job.name, options, device=device)
        write_result({**command_given, **written, **report}, file)
        print(f"{job.file}: {row['failed']}", flush=True)
    return row


def ended(command: Sequence[str], limit_s: float) -> tuple[int | None, str]:
    """Runs a command, and prints what it prints. Whatever processes it has started end with it.

    Returns:
        Its exit status, `None` where it was stopped after `limit_s`; and the end of its output.
    """
    last: deque[str] = deque(maxlen=LINES_KEPT)
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        process_group=0,  # no session: what ends this program's session ends it, too
        env={"PYTHONWARNINGS": "ignore::FutureWarning", **os.environ},  # of packages; they hide the output
    )
    assert process.stdout is not None
    reader = Thread(target=_show, args=(process.stdout, last), daemon=True)
    reader.start()
    status = None
    try:
        status = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        pass
    finally:
        with suppress(ProcessLookupError):  # it has left nobody
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        reader.join(timeout=10)  # it reads on while somebody outside of the group has the pipe
    return status, "".join(last)


def _show(output: IO[str], last: deque[str]) -> None:
    for line in output:
        print(line, end="", flush=True)
        last.append(line)


def plan(jobs: Sequence[Job], folder: Path, *, device: str, smoke: bool) -> str:
    """The commands by part, and how long they may take."""
    lines = []
    for part in sorted({job.part for job in jobs}):
        own = [job for job in jobs if job.part == part]
        expected_s, limit_s = sum(job.expected_s for job in own), sum(job.limit_s for job in own)
        lines.append(f"part {part}: {expected_s} s on an H200, by arithmetic; at most {limit_s} s")
        for job in own:
            command = shlex.join(command_of(job, folder, device=device, smoke=smoke))
            wanted = f"  (where there are {job.num_gpus} GPUs)" if job.num_gpus > 1 else ""
            wanted += f"  (where {job.needs} is installed)" if job.needs else ""
            lines.append(f"{job.limit_s:5} s  chunkdist bench {job.name} {command}{wanted}")
    return "\n".join(lines)


def why_not(job: Job, *, on_gpu: bool) -> str | None:
    """What this machine lacks for a job."""
    num_gpus = torch.cuda.device_count()
    if on_gpu and job.num_gpus > num_gpus:
        return f"it needs {job.num_gpus} GPUs, this machine has {num_gpus}"
    if job.needs is not None and importlib.util.find_spec(job.needs) is None:
        return f"it needs {job.needs}, which is not installed"
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the jobs; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = parser_of("all", "All that a GPU is wanted for.", "device", has_result=False)
    parser.set_defaults(device="cuda")
    parser.add_argument("--smoke", action="store_true", help="in small, on a CPU: the figures mean nothing")
    parser.add_argument("--json-dir", type=Path, required=True, metavar="DIR", help="where the results go")
    parser.add_argument("--part", type=int, choices=sorted({job.part for job in JOBS}), help="default: all")
    parser.add_argument("--dry-run", action="store_true", help="say what would run, and for how long at most")
    parser.add_argument("--only", default="", metavar="WORD", help="the jobs whose names have it")
    options = parser.parse_args(given)
    jobs = [job for job in JOBS if options.part in (None, job.part) and options.only in job.file]
    if not jobs:
        parser.error(f"--only {options.only}: no job has it in its name")
    device = "cpu" if options.smoke else options.device
    if options.dry_run:
        print(plan(jobs, options.json_dir, device=device, smoke=options.smoke))
        return 0
    check_device(parser, device)
    lacking = {job: why_not(job, on_gpu=device.startswith("cuda")) for job in jobs}
    for job, reason in lacking.items():
        if reason is not None:
            print(f"{job.file}: left out: {reason}")
    jobs = [job for job, reason in lacking.items() if reason is None]
    options.json_dir.mkdir(parents=True, exist_ok=True)
    # As by `timeout`: without it, what has been started would run on, and hold the GPU.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        rows = [run(job, options.json_dir, device=device, smoke=options.smoke) for job in jobs]
    finally:
        signal.signal(signal.SIGTERM, before)
    for row in rows:
        print(f"{row['job']:34}{row['seconds']:8.1f} s  {row.get('failed', 'done')}")
    return 1 if any("failed" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
