"""Checkpoints that are whole or have no name: ranks write into a folder beside them, then it is renamed.

So a run that is killed while it saves leaves nothing that could be taken for a checkpoint, by this program or
by another.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from chunkdist.train.checkpoint_files import (
    engine_of,
    fault_of,
    list_files,
    num_ranks_of,
    zero_states,
)
from chunkdist.train.ranks import engine_name, num_launched_ranks
from chunkdist.train.saving import whole_or_absent

if TYPE_CHECKING:
    from transformers import TrainingArguments

UNFINISHED = ".unfinished-checkpoint"
"""The folder in `output_dir` that holds a checkpoint while it is being written."""


@contextmanager
def whole_checkpoint(
    target: Path, args: TrainingArguments, wait_for_everyone: Callable[[], Any]
) -> Iterator[Path]:
    """Gives the folder in which the block, on every rank, writes a folder named as `target`; moves that to
    `target` when all are done. Collective.

    Raises:
        DiskFullError: there is no space; nothing is left of the checkpoint.
    """
    parent = target.parent / UNFINISHED
    moves = args.local_process_index == 0  # on every machine: each may have a disk of its own
    if moves:
        shutil.rmtree(parent, ignore_errors=True)
    wait_for_everyone()
    with whole_or_absent(parent, what=target.name.replace("-", " of step "), is_writer=moves):
        yield parent
        wait_for_everyone()
        written = parent / target.name
        if moves and written.exists():
            if args.process_index == 0:
                list_files(written, args.world_size)
            _flush(written)
        wait_for_everyone()
    if moves:
        with suppress(FileNotFoundError):  # moved by another machine that shares the disk
            if target.exists() and written.exists():
                os.rename(target, parent / f"{target.name}-before")
            os.rename(written, target)
        shutil.rmtree(parent, ignore_errors=True)
    wait_for_everyone()


def checkpoint_to_resume(args: TrainingArguments) -> Path | None:
    """The checkpoint that `resume_from_checkpoint` means: for `true` the last complete one of `output_dir`.

    Raises:
        ValueError: it is not complete, there is none, another engine has saved it, or DeepSpeed has cut it
            for another number of ranks.
    """
    option: str | bool | None = args.resume_from_checkpoint
    word = str(option).lower()
    if option is None or word == "false":
        return None
    folder = Path(args.output_dir or ".")
    if word == "true":
        newest_first = sorted(folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"), key=_step, reverse=True)
        faults = {path: _fault(path) for path in newest_first}
        checkpoint = next((path for path, fault in faults.items() if fault is None), None)
        if checkpoint is None:
            reasons = "; ".join(f"{path.name}: {fault}" for path, fault in faults.items())
            raise ValueError(
                f"resume_from_checkpoint=true, but {folder} holds no complete checkpoint"
                f"{f' ({reasons})' if reasons else ''}: leave the option out to begin afresh"
            )
    else:
        checkpoint = Path(str(option))
        fault = _fault(checkpoint)
        if fault is not None:
            raise ValueError(
                f"resume_from_checkpoint={checkpoint} is no complete checkpoint: {fault}; write true for the "
                "last complete one of output_dir"
            )
    _refuse_other_engine(checkpoint, engine_name(args))
    _refuse_other_ranks(checkpoint, num_launched_ranks())
    return checkpoint


def resume_line(checkpoint: Path) -> str:
    """What is resumed, and what cannot be as it was."""
    saved, num_ranks = num_ranks_of(checkpoint), num_launched_ranks()
    newer = [
        path
        for path in checkpoint.parent.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if _step(path) > _step(checkpoint)
    ]
    faults = [f"{path.name}: {fault}" for path in sorted(newer, key=_step) if (fault := _fault(path))]
    passed_over = f" (newer, but not complete: {'; '.join(faults)})" if faults else ""
    if saved == num_ranks:
        return f"resuming from {checkpoint}{passed_over}"
    return (
        f"resuming from {checkpoint}{passed_over} of {saved} ranks on {num_ranks}: random draws begin "
        "afresh, and a step has the same samples only if ranks x per_device_train_batch_size x "
        "gradient_accumulation_steps is what it was"
    )


def _fault(path: Path) -> str | None:
    return "it was still being written" if UNFINISHED in path.absolute().parts else fault_of(path)


def _step(path: Path) -> int:
    match = re.search(r"-(\d+)$", path.name)
    return int(match[1]) if match else -1


def _refuse_other_engine(checkpoint: Path, engine: str) -> None:
    """The trainer looks for the files of its own engine only: without them the optimizer's states and the
    learning rate would begin afresh."""
    saved = engine_of(checkpoint)
    if engine != saved:
        raise ValueError(
            f"{checkpoint} was saved under {saved}, and this job runs under {engine}, which cannot read its "
            f"optimizer's states: start it under {saved}, or train on from the saved model without "
            "resume_from_checkpoint"
        )


def _refuse_other_ranks(checkpoint: Path, num_ranks: int) -> None:
    """ZeRO's optimizer states are cut into as many pieces as there were ranks."""
    states = zero_states(checkpoint)
    saved = num_ranks_of(checkpoint)
    if not states or saved == num_ranks or (checkpoint / "latest_universal").exists():
        return
    folder = states[0].parent.name
    raise ValueError(
        f"{checkpoint} was saved by {saved} ranks of DeepSpeed ZeRO, and this job has {num_ranks}: start "
        f"{saved} ranks, or convert it: python -m deepspeed.checkpoint.ds_to_universal --input_folder "
        f"{checkpoint}/{folder} --output_folder {checkpoint}/{folder}_universal --inject_missing_state, "
        """and write "checkpoint": {"load_universal": true} in DeepSpeed's config """
        "(from ZeRO-3 it loses Adam's step count: its bias correction begins again)"
    )


def _flush(folder: Path) -> None:
    """Waits until the disk has everything: a rename may reach it before the files that it names."""
    for path in (*folder.rglob("*"), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
