"""The engine that a plan is made for: from the command's options, or the file for the launcher."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate.utils.deepspeed import HfDeepSpeedConfig  # type: ignore[import-untyped]

from chunkdist.cli.plan_options import PlanOptions
from chunkdist.memory.sharded import Engine
from chunkdist.train.launch.engine import engine_of_deepspeed
from chunkdist.train.options.json_options import read_json_file
from chunkdist.train.options.yaml_options import read_yaml

_HAVE_WEIGHTS, _HAVE_OPTIMIZER = ("fsdp2", "zero3"), ("fsdp2", "zero1", "zero2", "zero3")
"""Engines that keep weights, and optimizer states, on the host."""


def planned_engine(asked: PlanOptions, mixed: int | None) -> Engine:
    """The engine, with its ranks, and what it keeps on the host.

    Args:
        mixed: Bytes of an activation's element under bf16 or fp16, else `None`.

    Raises:
        ValueError: a file says nothing of an engine, or the engine has no such ranks or offload.
    """
    engine = Engine(name=asked.engine or "single", gathered_element_bytes=mixed)
    if asked.deepspeed is not None:
        engine = _of_deepspeed(asked.deepspeed, mixed)
    elif asked.accelerate is not None:
        engine = _of_accelerate(asked.accelerate, mixed)
    engine = replace(
        engine,
        num_ranks=asked.num_ranks or engine.num_ranks,
        offloads_weights=engine.offloads_weights or asked.offload_weights,
        offloads_optimizer=engine.offloads_optimizer or asked.offload_optimizer,
    )
    _check(engine)
    return engine


def _of_deepspeed(path: str, mixed: int | None) -> Engine:
    return engine_of_deepspeed(HfDeepSpeedConfig(dict(read_json_file(Path(path), "--deepspeed"))), 1, mixed)


def _of_accelerate(path: str, mixed: int | None) -> Engine:
    given: dict[str, Any] = dict(read_yaml(Path(path), "--accelerate"))
    kind, num_ranks = str(given.get("distributed_type", "NO")), int(given.get("num_processes", 1))
    if kind == "FSDP":
        offloads = bool((given.get("fsdp_config") or {}).get("fsdp_offload_params", False))
        return Engine(
            name="fsdp2",
            num_ranks=num_ranks,
            gathered_element_bytes=mixed,
            offloads_weights=offloads,
            offloads_optimizer=offloads,
        )
    if kind in ("NO", "MULTI_GPU"):
        return Engine(name="ddp" if num_ranks > 1 else "single", num_ranks=num_ranks)
    raise ValueError(
        f"--accelerate {path} has distributed_type={kind!r}: a plan knows FSDP, MULTI_GPU and NO; "
        "of DeepSpeed, write --deepspeed FILE"
    )


def _check(engine: Engine) -> None:
    if engine.name == "single" and engine.num_ranks > 1:
        raise ValueError(
            f"--num-ranks {engine.num_ranks} without an engine, which is one process: write --engine ddp, "
            "fsdp2, zero1, zero2 or zero3"
        )
    for option, is_set, known in (
        ("--offload-weights", engine.offloads_weights, _HAVE_WEIGHTS),
        ("--offload-optimizer", engine.offloads_optimizer, _HAVE_OPTIMIZER),
    ):
        if is_set and engine.name not in known:
            raise ValueError(
                f"{option} with --engine {engine.name}, which keeps it on the device: write --engine "
                + " or ".join(known)
            )
    if engine.name == "fsdp2" and engine.offloads_weights != engine.offloads_optimizer:
        raise ValueError(
            "FSDP2 offloads weights, gradients and optimizer states, or nothing: write both "
            "--offload-weights and --offload-optimizer"
        )
