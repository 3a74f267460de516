"""All that a GPU is wanted for, in parts of at most ten minutes: each benchmark in a process of its own.

One that fails, or takes longer than it may, is reported in its JSON, and the others go on. Backends are
checked before anything else; where one is wrong, no figure that follows is worth anything, and the exit
status is 1. So it is when any benchmark has failed.

    python -m chunkdist.bench.all --json-dir DIR [--part 1] [--only WORD] [--device cuda] [--dry-run]
    python -m chunkdist.bench.all --json-dir DIR --smoke          # the same commands in small, on a CPU
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from chunkdist.bench import module_of
from chunkdist.bench.environment import provenance, write_result
from chunkdist.bench.options import parsed, parser_of

_LENGTHS = "4096 8192 16384"


SMOKE_PATIENCE = 5
"""How many times its limit a job may take with `--smoke`, on whatever machine."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One benchmark with its options; its result goes to `{file}.json`. It is stopped after `limit_s`.

    `{file}` in the options is the result's file without its ending.
    """

    part: int
    name: str
    file: str
    options: str = ""
    limit_s: int = 120
    num_gpus: int = 1
    """Fewer, and it is left out."""


JOBS = (
    Job(part=1, name="attention", file="attention", limit_s=60),
    Job(
        part=1,
        name="step",
        file="step-8b",
        options=f"--model 8b --num-tokens {_LENGTHS} --repetitions 2",
        limit_s=170,
    ),
    Job(
        part=1,
        name="step",
        file="step-8b-64k",
        options="--model 8b --num-tokens 65536 --repetitions 1 --chunk-sizes 8192 --without plain paper host",
        limit_s=330,
    ),
    Job(
        part=2,
        name="max-length",
        file="max-length-24gib",
        options="--memory-gib 24 --start 65536 --limit 262144 --seconds 80 --only host",
        limit_s=250,
    ),
    Job(
        part=2,
        name="max-length",
        file="max-length-24gib-checkpointing",
        options="--memory-gib 24 --start 8192 --limit 131072 --seconds 60 --only checkpointing",
        limit_s=100,
    ),
    Job(
        part=2,
        name="spaco",
        file="spaco-1b",
        options="--model 1b --num-tokens 16384 --repetitions 2",
        limit_s=90,
    ),
    Job(
        part=2,
        name="spaco",
        file="spaco-1b-128k",
        options="--model 1b --num-tokens 131072 --repetitions 1",
        limit_s=100,
    ),
    Job(
        part=3,
        name="step",
        file="step-8b-24gib",
        options=f"--model 8b --memory-gib 24 --num-tokens {_LENGTHS} --repetitions 2 --offload",
        limit_s=170,
    ),
    Job(
        part=3,
        name="overhead",
        file="overhead-8b",
        options="--model 8b --num-layers 4 --repetitions 3",
        limit_s=60,
    ),
    Job(
        part=3,
        name="profile",
        file="profile-8b",
        options="--model 8b --num-layers 4 --num-tokens 16384 --trace {file}-trace.json.gz",
        limit_s=70,
    ),
    Job(part=3, name="gradient-error", file="gradient-error", limit_s=60),
    Job(
        part=3,
        name="offload",
        file="offload-8b",
        options="--model 8b --num-tokens 16384 --repetitions 2",
        limit_s=80,
    ),
    Job(
        part=3,
        name="step",
        file="step-1b",
        options="--model 1b --num-tokens 32768 --repetitions 1 --groups 4",
        limit_s=70,
    ),
    Job(
        part=4,
        name="long-tail",
        file="long-tail",
        options="--model 1b --without-simulation --repetitions 1",
        limit_s=70,
    ),
    Job(
        part=4,
        name="sharding",
        file="sharding",
        options="--model 1b --num-tokens 8192",
        limit_s=90,
        num_gpus=2,
    ),
)
"""What matters most comes first: a machine may be lent for less than all parts."""


def command_of(job: Job, folder: Path, *, device: str, smoke: bool) -> list[str]:
    """The options of a job."""
    given = ["--smoke"] if smoke else ["--device", device, *shlex.split(job.options)]
    if smoke and "--trace" in job.options:
        given += ["--trace", "{file}-trace.json.gz"]
    file = str(folder / job.file)
    return [*(option.replace("{file}", file) for option in given), "--json", f"{file}.json"]


def run(job: Job, folder: Path, *, device: str, smoke: bool) -> dict[str, Any]:
    """Runs a job; what became of it: `seconds`, and `failed`, which says how, where it has."""
    file = folder / f"{job.file}.json"
    file.unlink(missing_ok=True)
    options = command_of(job, folder, device=device, smoke=smoke)
    command = [sys.executable, "-m", module_of(job.name), *options]
    limit_s = job.limit_s * (SMOKE_PATIENCE if smoke else 1)
    start = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)
        output, errors = done.stdout, done.stderr
        failed = None if done.returncode == 0 else f"exit status {done.returncode}"
    except subprocess.TimeoutExpired as expired:
        output, errors = (_text(part) for part in (expired.stdout, expired.stderr))
        failed = f"stopped after {limit_s} s"
    print(output, flush=True)
    row: dict[str, Any] = {"job": job.file, "seconds": time.perf_counter() - start}
    if failed is not None:
        row["failed"] = failed
        report = {"failed": failed, "errors": errors[-4000:]}
        partial = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        command_given = provenance(job.name, options, device=device)
        write_result({**command_given, **partial, **report}, file)
        print(f"{job.file}: {failed}\n{errors[-2000:]}", flush=True)
    return row


def plan(jobs: Sequence[Job], folder: Path, *, device: str, smoke: bool) -> str:
    """The commands by part, and how long they may take."""
    lines = []
    for part in sorted({job.part for job in jobs}):
        own = [job for job in jobs if job.part == part]
        lines.append(f"part {part}: at most {sum(job.limit_s for job in own)} s")
        for job in own:
            command = shlex.join(command_of(job, folder, device=device, smoke=smoke))
            gpus = f"  (where there are {job.num_gpus} GPUs)" if job.num_gpus > 1 else ""
            lines.append(f"{job.limit_s:5} s  chunkdist bench {job.name} {command}{gpus}")
    return "\n".join(lines)


def _text(part: Any) -> str:
    return part.decode(errors="replace") if isinstance(part, bytes) else part or ""


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
    options = parsed(parser, given)
    jobs = [job for job in JOBS if options.part in (None, job.part) and options.only in job.file]
    if not jobs:
        parser.error(f"--only {options.only}: no job has it in its name")
    device = "cpu" if options.smoke else options.device
    if options.dry_run:
        print(plan(jobs, options.json_dir, device=device, smoke=options.smoke))
        return 0
    if not options.smoke and device.startswith("cuda"):
        num_gpus = torch.cuda.device_count()
        for job in (job for job in jobs if job.num_gpus > num_gpus):
            print(f"{job.file}: left out: it needs {job.num_gpus} GPUs, this machine has {num_gpus}")
        jobs = [job for job in jobs if job.num_gpus <= num_gpus]
    options.json_dir.mkdir(parents=True, exist_ok=True)
    rows = [run(job, options.json_dir, device=device, smoke=options.smoke) for job in jobs]
    for row in rows:
        print(f"{row['job']:34}{row['seconds']:8.1f} s  {row.get('failed', 'done')}")
    return 1 if any("failed" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
