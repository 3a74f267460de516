"""What `chunkdist bench all` runs, in parts of ten minutes, what matters most first.

The first three parts decide what is to be reached: the time beside gradient checkpointing at every length,
1.3 x the paper's loop, 131,072 tokens within 24 GiB, the utilisation at 64K and above by kernel, SpaCO at 16K
and 128K. What a job is expected to take on an H200 is arithmetic: a step as in docs/performance.md, once to
warm up and once for each round, and 25 s for imports, an 8B model and kernels. cuDNN plans each shape, of a
chunk and its prefix, in about 0.5 s: in chunks of 4,096, 24 plans at 32K, 45 at 64K and 100 at 128K (those of
the forward twice, since the backward runs in another thread). None of it has been measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from shlex import join

from chunkdist.bench.ways import BASELINE, CHOICE, KEPT, PLANNED


@dataclass(frozen=True, kw_only=True)
class Job:
    """One benchmark with its options; its result goes to `{file}.json`.

    Args:
        options: `{file}` in them is the result's file without its ending.
        smoke: Options beside `--smoke`, which has sizes of its own.
        limit_s: It is stopped then.
        num_gpus: Fewer, and it is left out.
        needs: A package; without it, it is left out.
    """

    part: int
    name: str
    file: str
    options: str = ""
    smoke: str = ""
    expected_s: int = 1
    limit_s: int = 120
    num_gpus: int = 1
    needs: str | None = None


_ONLY_OFFLOAD = "--offload --without gradient plain paper K/V group planned"
_ONLY_KEPT = "--without plain paper host choice rebuilt group planned varlen"
"""K/V kept, beside gradient checkpointing; `varlen` is what runs without a variant."""
_KEPT_CUDNN = f"{KEPT}, attention cudnn"
_BY_KERNEL = join(["--only", BASELINE, CHOICE, KEPT, _KEPT_CUDNN, PLANNED])
"""What is told least by is last: it is cut first."""
_KEPT_BESIDE_BASELINE = join(["--only", BASELINE, KEPT])

JOBS = (
    Job(part=1, name="attention", file="attention", expected_s=125, limit_s=140),
    Job(
        part=1,
        name="step",
        file="step-8b",
        options="--model 8b --num-tokens 4096 8192 16384 --repetitions 2",
        smoke="--repetitions 1",
        expected_s=150,
        limit_s=190,
    ),
    Job(
        part=1,
        name="step",
        file="step-8b-24gib-128k",
        options=f"--model 8b --memory-gib 24 --num-tokens 131072 --repetitions 1 {_ONLY_OFFLOAD}",
        smoke=f"--repetitions 1 {_ONLY_OFFLOAD}",
        expected_s=205,
        limit_s=240,
    ),
    Job(
        part=2,
        name="step",
        file="step-8b-64k",
        options=f"--model 8b --num-tokens 32768 65536 --repetitions 1 --variants cudnn {_BY_KERNEL}",
        smoke=f"--repetitions 1 {_KEPT_BESIDE_BASELINE}",
        expected_s=290,
        limit_s=300,
    ),
    Job(
        part=2,
        name="spaco",
        file="spaco-1b",
        options="--model 1b --num-tokens 16384 --repetitions 1",
        smoke="--repetitions 1",
        expected_s=80,
        limit_s=130,
    ),
    Job(
        part=2,
        name="spaco",
        file="spaco-1b-128k",
        options="--model 1b --num-tokens 131072 --repetitions 1",
        smoke="--repetitions 1",
        expected_s=95,
        limit_s=140,
    ),
    Job(
        part=3,
        name="step",
        file="step-4-layers-variants",
        options=f"--model 8b --num-layers 4 --num-tokens 65536 --repetitions 1 --variants all {_ONLY_KEPT}",
        smoke=f"--num-layers 1 --repetitions 1 --variants all {_ONLY_KEPT}",
        expected_s=185,
        limit_s=210,
    ),
    Job(
        part=3,
        name="step",
        file="step-8b-128k",
        options="--model 8b --num-tokens 131072 --repetitions 1 --variants cudnn "
        + join(["--only", CHOICE, _KEPT_CUDNN]),
        smoke=f"--repetitions 1 {_KEPT_BESIDE_BASELINE}",
        expected_s=260,
        limit_s=300,
    ),
    Job(
        part=4,
        name="step",
        file="step-8b-24gib",
        options="--model 8b --memory-gib 24 --num-tokens 4096 8192 16384 32768 65536 --repetitions 1 "
        "--offload --without plain paper",
        smoke="--repetitions 1 --offload --without plain paper",
        expected_s=240,
        limit_s=290,
    ),
    Job(
        part=4,
        name="step",
        file="step-8-layers-schedules",
        options="--model 8b --num-layers 8 --num-tokens 32768 --repetitions 1 "
        "--chunk-sizes 1024 2048 8192 16384 --groups 2 4 8 --without plain paper host choice planned",
        smoke="--repetitions 1 --chunk-sizes 8 32 --groups 2 --without plain paper host choice planned",
        expected_s=85,
        limit_s=130,
    ),
    Job(
        part=4,
        name="step",
        file="step-2-layers-128k",
        options="--model 8b --num-layers 2 --num-tokens 131072 --repetitions 1 --offload "
        "--without plain paper inputs choice planned",
        smoke="--num-layers 2 --repetitions 1 --offload --without plain paper inputs choice planned",
        expected_s=70,
        limit_s=90,
    ),
    Job(
        part=4,
        name="profile",
        file="profile-8b",
        options="--model 8b --num-layers 4 --num-tokens 65536 --trace {file}-trace.json.gz",
        smoke="--trace {file}-trace.json.gz",
        expected_s=45,
        limit_s=80,
    ),
    Job(
        part=5,
        name="overhead",
        file="overhead-8b",
        options="--model 8b --num-layers 4 --repetitions 3",
        expected_s=40,
        limit_s=60,
    ),
    Job(
        part=5,
        name="max-length",
        file="max-length-card",
        options="--whole-card --start 262144 --limit 327680 --seconds 240 --only rebuilt",
        smoke="--only rebuilt --limit 128",
        expected_s=300,
        limit_s=525,
    ),
    Job(
        part=6,
        name="max-length",
        file="max-length-24gib",
        options="--memory-gib 24 --start 131072 --limit 196608 --seconds 330 --only offload",
        smoke="--only offload --limit 128",
        expected_s=420,
        limit_s=585,
    ),
    Job(part=7, name="gradient-error", file="gradient-error", expected_s=40, limit_s=60),
    Job(
        part=7,
        name="max-length",
        file="max-length-24gib-checkpointing",
        options="--memory-gib 24 --start 8192 --limit 131072 --seconds 50 --only checkpointing",
        smoke="--only checkpointing --limit 128",
        expected_s=45,
        limit_s=85,
    ),
    Job(
        part=7,
        name="offload",
        file="offload-8b",
        options="--model 8b --num-tokens 16384 --repetitions 2",
        smoke="--repetitions 1",
        expected_s=70,
        limit_s=100,
    ),
    Job(
        part=7,
        name="step",
        file="step-1b",
        options="--model 1b --num-tokens 32768 --repetitions 1 --groups 4",
        smoke="--repetitions 1 --groups 2",
        expected_s=65,
        limit_s=90,
    ),
    Job(
        part=7,
        name="long-tail",
        file="long-tail",
        options="--model 1b --without-simulation --repetitions 1",
        smoke="--without-simulation",
        expected_s=60,
        limit_s=90,
    ),
    Job(
        part=7,
        name="step",
        file="step-4-layers-fa3",
        options="--model 8b --num-layers 4 --num-tokens 65536 --repetitions 1 --flash-impl FA3 "
        "--without plain paper host group planned",
        smoke="--repetitions 1",
        expected_s=60,
        limit_s=90,
        needs="flash_attn_interface",
    ),
    Job(
        part=8,
        name="sharding",
        file="sharding",
        options="--model 1b --num-tokens 8192",
        expected_s=90,
        limit_s=150,
        num_gpus=2,
    ),
)
