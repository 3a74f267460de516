"""One command runs all; and two results are compared."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from chunkdist.bench import BENCHMARKS, all, compare, options
from chunkdist.bench.jobs import JOBS, Job
from chunkdist.bench.ways import BASELINE, CHOICE, KEPT, PLANNED

ROOT = Path(__file__).parents[2]


def test_a_job_that_fails_is_reported_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = (
        Job(part=1, name="no-such", file="broken"),
        Job(part=1, name="step", file="slow", limit_s=0),
        Job(part=1, name="spaco", file="works"),
        Job(part=2, name="attention", file="not asked for"),
    )
    monkeypatch.setattr(all, "JOBS", jobs)
    assert all.main(["--smoke", "--part", "1", "--json-dir", str(tmp_path / "new")]) == 1
    found = {file.stem: json.loads(file.read_text()) for file in (tmp_path / "new").glob("*.json")}
    assert found.keys() == {"broken", "slow", "works"}
    assert found["broken"]["failed"] == "exit status 1"
    assert "no_such" in found["broken"]["output"]
    assert found["slow"]["failed"] == "stopped after 0 s"
    assert found["slow"]["versions"]
    assert "failed" not in found["works"]
    out = capsys.readouterr().out
    assert "faster than SeCO" in out, "the table of what works is shown"
    lines = out.splitlines()[-3:]
    assert [line.split()[0] for line in lines] == ["broken", "slow", "works"]
    assert lines[-1].endswith("done")


def test_jobs_are_such_that_a_part_ends_in_ten_minutes() -> None:
    for part in {job.part for job in JOBS}:
        assert sum(job.limit_s for job in JOBS if job.part == part) <= 590, "10 s are for bench all itself"
    assert len({job.file for job in JOBS}) == len(JOBS)
    assert {job.name for job in JOBS} <= BENCHMARKS.keys()
    assert JOBS[0].file == "attention"
    assert [job.part for job in JOBS] == sorted(job.part for job in JOBS)
    assert not [job.file for job in JOBS if job.expected_s >= job.limit_s]


def test_a_machine_lent_for_half_an_hour_runs_three_parts() -> None:
    """Which decide what is to be reached; 150 s are for starting it."""
    deciding = [job for job in JOBS if job.part <= 3]
    assert sum(job.limit_s for job in deciding) <= 1650
    options = {job.file: job.options for job in deciding}
    assert {job.name for job in deciding} == {"attention", "step", "spaco"}
    lengths = {int(word) for text in options.values() for word in text.split() if word.isdigit()}
    assert {2**power for power in range(12, 18)} <= lengths, "4K to 128K"
    assert "--memory-gib 24 --num-tokens 131072" in options["step-8b-24gib-128k"]
    assert "--variants all" in options["step-4-layers-variants"]
    assert "varlen" in options["step-4-layers-variants"].partition("--without")[2], "what auto runs"
    by_kernel = shlex.split(options["step-8b-64k"].partition("--only")[2])
    assert by_kernel == [BASELINE, CHOICE, KEPT, f"{KEPT}, attention cudnn", PLANNED]
    assert shlex.split(options["step-8b-128k"].partition("--only")[2])[0] == CHOICE
    order = [job.file for job in deciding]
    assert order.index("step-4-layers-variants") < order.index("step-8b-128k"), "the shorter one first"


def test_a_call_brings_back_few_files() -> None:
    """Of a lent machine, at most 8 files come back from a call."""
    for part in {job.part for job in JOBS}:
        own = [job for job in JOBS if job.part == part]
        assert len(own) + sum("--trace" in job.options for job in own) <= 8


def test_a_dry_run_shows_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "none"
    assert all.main(["--dry-run", "--json-dir", str(folder)]) == 0
    assert not folder.exists()
    out = capsys.readouterr().out
    for job in JOBS:
        assert f"--json {folder}/{job.file}.json" in out
    assert f"--trace {folder}/profile-8b-trace.json.gz --json" in out
    assert "{file}" not in out
    limits = [int(line.split()[-2]) for line in out.splitlines() if line.startswith("part ")]
    assert sum(limits) == sum(job.limit_s for job in JOBS)


def alive(pid: int) -> bool:
    """A process that has ended and nobody has asked for yet is not."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return status != "Z"


@pytest.mark.parametrize("end", ["import time; time.sleep(60)", "raise SystemExit(3)"])
def test_processes_that_a_job_has_started_end_with_it(
    end: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """When it is stopped, and when it fails: ranks, say, that wait for one that will never come."""
    program = tmp_path / "job.py"
    rank = "import time; time.sleep(60)"
    program.write_text(
        "import subprocess, sys\n"
        "quiet = {'stdout': subprocess.DEVNULL, 'stderr': subprocess.DEVNULL}\n"
        f"rank = subprocess.Popen([sys.executable, '-c', {rank!r}], **quiet)\n"
        f"print('rank', rank.pid, flush=True)\n{end}\n"
    )
    status, output = all.ended([sys.executable, str(program)], limit_s=3)
    assert status == (3 if "raise" in end else None)
    assert output == capsys.readouterr().out
    pid = int(output.split()[1])
    deadline = time.monotonic() + 10
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(pid)


def test_what_a_stopped_job_has_written_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job writes what it has, and is stopped."""
    job = Job(part=1, name="step", file="slow", limit_s=1)

    def ended(command: list[str], limit_s: float) -> tuple[None, str]:
        file = Path(command[-1])
        file.write_text(json.dumps({"benchmark": "step", "rows": [1], "partial": True}))
        file.with_name(f"{file.name}.part").write_text("{")
        return None, "said"

    monkeypatch.setattr(all, "ended", ended)
    assert all.run(job, tmp_path, device="cpu", smoke=False)["failed"] == "stopped after 1 s"
    found = json.loads((tmp_path / "slow.json").read_text())
    assert (found["rows"], found["failed"], found["output"]) == ([1], "stopped after 1 s", "said")
    assert list(tmp_path.iterdir()) == [tmp_path / "slow.json"]


def test_jobs_of_several_gpus_are_left_out_without_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = [
        Job(part=1, name="spaco", file="one"),
        Job(part=1, name="sharding", file="two", num_gpus=2),
        Job(part=1, name="step", file="three", needs="no_such_package"),
    ]
    ran: list[str] = []
    monkeypatch.setattr(all, "JOBS", jobs)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        all, "run", lambda job, folder, **settings: ran.append(job.file) or {"job": job.file, "seconds": 0.0}
    )
    for num_gpus, expected in ((1, ["one"]), (2, ["one", "two"])):
        monkeypatch.setattr(all.torch.cuda, "device_count", lambda num=num_gpus: num)
        assert all.main(["--json-dir", str(tmp_path)]) == 0
        assert ran == expected
        ran.clear()
    out = capsys.readouterr().out
    assert "two: left out: it needs 2 GPUs, this machine has 1" in out
    assert "three: left out: it needs no_such_package, which is not installed" in out


def test_without_a_gpu_it_says_so_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        all.main(["--json-dir", str(tmp_path / "new")])
    assert "torch sees no GPU" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


class _Parsed(Exception):
    pass


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.file)
def test_options_of_jobs_are_understood(job: Job, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All checks of the options pass; what runs after them does not run."""
    import importlib

    module = importlib.import_module(all.module_of(job.name))

    def stop(*args: Any, **kwargs: Any) -> None:
        raise _Parsed

    monkeypatch.setattr(module, "report_ways" if hasattr(module, "report_ways") else "provenance", stop)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(options, "limit_gpu_memory", lambda memory_gib: None)
    monkeypatch.setattr(options, "use_expandable_segments", lambda: None)
    monkeypatch.setattr(options, "activate_flash", lambda parser, name: None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(_Parsed):
        module.main(["--device", "cuda", *shlex.split(job.options)])
    with pytest.raises(_Parsed):
        module.main(["--smoke", *shlex.split(job.smoke)])


def result(**changes: Any) -> dict[str, Any]:
    row = {"num_tokens": 64, "way": "chunked", "outcome": "ran", "wall_ratio": 1.0, "median_wall_s": 2.0}
    row |= {"mfu": 0.5, "tokens_per_s": 32.0, "passed": True, "largest_gradient_difference": 0.0}
    return {"benchmark": "step", "rows": [{**row, "peak_allocated_bytes": 100, **changes}]}


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({}, 0),
        ({"wall_ratio": 1.2}, 1),
        ({"wall_ratio": 0.5}, 0),
        ({"median_wall_s": 9.0}, 0),  # another machine: the ratio is judged
        ({"peak_allocated_bytes": 120}, 1),
        ({"outcome": "out of memory"}, 1),
        ({"mfu": 0.4}, 0),  # as seconds
        ({"tokens_per_s": 1.0}, 0),
        ({"wall_ratio": float("nan")}, 1),
        ({"wall_ratio": None}, 1),
        ({"largest_gradient_difference": 4e-7}, 0),  # rounding
        ({"largest_gradient_difference": 1e-4}, 1),
        ({"largest_gradient_difference": float("nan")}, 1),
        ({"passed": False}, 1),
        ({"failed": "wrong"}, 1),
    ],
)
def test_a_slowdown_fails(changes: dict[str, Any], status: int, tmp_path: Path) -> None:
    for name, content in {"old": result(), "new": result(**changes)}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    files = [str(tmp_path / f"{name}.json") for name in ("old", "new")]
    assert compare.main(files) == status


def test_no_number_is_worse_than_any_and_any_is_better_than_none() -> None:
    (good, bad) = (
        {"benchmark": "a", "rows": [{"way": "a", "error": value}]} for value in (1.0, float("nan"))
    )
    assert [compare.moved(*pair)[0]["worse"] for pair in ((good, bad), (bad, bad), (bad, good))] == [
        float("inf"),
        float("inf"),
        0,
    ]


def test_results_within_24_gib_are_measured_within_24_gib() -> None:
    """The docs go by the name of the file."""
    jobs = [job for job in JOBS if "24gib" in job.file]
    assert len(jobs) > 2
    for job in jobs:
        assert "--memory-gib 24 " in job.options


def test_seconds_are_judged_where_there_is_no_ratio() -> None:
    old, new = ({"benchmark": "overhead", "rows": [{"way": "a", "wall_s": s}]} for s in (1.0, 3.0))
    (change,) = compare.moved(old, new)
    assert change["worse"] == pytest.approx(3)
    assert "WORSE" in compare.table([change], 1.1)
    old, new = ({"benchmark": "max-length", "rows": [{"way": "a", "fits": n}]} for n in (100, 50))
    assert compare.moved(old, new)[0]["worse"] == pytest.approx(2), "shorter is worse"


@pytest.mark.parametrize("figure", ["mfu", "tokens_per_s", "wall_speedup", "cpu_speedup"])
def test_of_rates_and_speedups_more_is_better(figure: str) -> None:
    old, new = ({"benchmark": "long-tail", "summary": {"a": {figure: value}}} for value in (4.0, 2.0))
    (change,) = compare.moved(old, new)
    assert change["worse"] == pytest.approx(2)
    assert compare.moved(old, new, [figure]) == [change], "asked for by name, too"
    assert compare.moved(new, old)[0]["worse"] == pytest.approx(0.5)


def test_seconds_are_not_judged_beside_a_speedup() -> None:
    old, new = (
        {"benchmark": "long-tail", "summary": {"a": {"wall_speedup": 2.0, "wall_s": s, "cpu_s": s}}}
        for s in (1.0, 9.0)
    )
    assert [change["figure"] for change in compare.moved(old, new)] == ["wall_speedup"]


def test_what_is_gone_or_fails_is_worse(tmp_path: Path) -> None:
    row = result()["rows"][0]
    two = {**result(), "rows": [row, {**row, "way": "other"}]}
    (gone,) = (change for change in compare.moved(two, result()) if change["worse"] > 1)
    assert gone == {"row": "other, 64", "figure": "row", "worse": float("inf")}
    assert gone in compare.moved(two, result(), ["wall_ratio"])
    assert {change["worse"] for change in compare.moved(result(), two)} == {1}, "a new row is no news"
    stopped = {"benchmark": "step", "failed": "stopped after 60 s"}
    for new in ({**result(), **stopped}, stopped, {**result(), "passed": False}):
        assert float("inf") in [change["worse"] for change in compare.moved(result(), new)]
    assert {change["worse"] for change in compare.moved({**result(), **stopped}, result())} == {1}
    for name, content in {"old": result(), "new": stopped}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    assert compare.main([str(tmp_path / "old.json"), str(tmp_path / "new.json")]) == 1


def test_what_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="of step and spaco"):
        compare.moved(result(), {"benchmark": "spaco", "summary": {}})
    with pytest.raises(ValueError, match="no row in common"):
        compare.moved(result(), result(way="other"))
    for what, values in {
        "model": ({"num_layers": 4, "new": 1}, {"num_layers": 8}),
        "baseline": ("a", "b"),
    }.items():
        old, new = ({**result(), what: value} for value in values)
        with pytest.raises(ValueError, match=f"the results differ in {what}"):
            compare.moved(old, new)
    nothing = {"benchmark": "plan", "rows": [{"name": "a", "peak": 1}]}
    with pytest.raises(ValueError, match="no figure that is known in common"):
        compare.moved(nothing, nothing)


def test_what_it_has_started_ends_with_it(tmp_path: Path) -> None:
    """`timeout` ends a program by SIGTERM."""
    given = ["--smoke", "--only", "step-1b", "--json-dir", str(tmp_path)]
    process = subprocess.Popen([sys.executable, "-m", "chunkdist.bench.all", *given], cwd=ROOT)
    parent = psutil.Process(process.pid)
    deadline = time.monotonic() + 60
    while not (jobs := [child for child in parent.children() if "chunkdist.bench.step" in child.cmdline()]):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.terminate()
    assert process.wait(30) == 128 + signal.SIGTERM
    _, alive = psutil.wait_procs(jobs, timeout=10)
    assert not alive
