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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from chunkdist.train.checkpoints.files import (
    engine_of,
    fault_of,
    list_files,
    num_ranks_of,
    zero_states,
)
from chunkdist.train.checkpoints.run_record import RunRecord
from chunkdist.train.checkpoints.saving import whole_or_absent
from chunkdist.train.launch.ranks import engine_name, num_launched_ranks

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


@dataclass(frozen=True, kw_only=True)
class Resumption:
    """What `resume_from_checkpoint` comes to.

    Args:
        checkpoint: Where the run goes on; `None`: it begins.
        run: The id of the run that goes on; `None`: another run begins, be it with a checkpoint.
        passed_over: Why checkpoints with higher steps were not taken.
        was_asked: Whether the option was set.
    """

    checkpoint: Path | None = None
    run: str | None = None
    passed_over: tuple[str, ...] = ()
    was_asked: bool = False

    def line(self) -> str | None:
        """What a person is told."""
        if not self.was_asked:
            return None
        reasons = f" (passed over: {'; '.join(self.passed_over)})" if self.passed_over else ""
        if self.checkpoint is None:
            return f"resume_from_checkpoint: this run has no checkpoint yet{reasons}, it begins"
        saved, num_ranks = num_ranks_of(self.checkpoint), num_launched_ranks()
        begun = f"resuming from {self.checkpoint}{reasons}"
        if saved == num_ranks:
            return begun
        return (
            f"{begun} of {saved} ranks on {num_ranks}: random draws begin afresh, and a step has the same "
            "samples only if ranks x per_device_train_batch_size x gradient_accumulation_steps is what it was"
        )


def resumption_of(args: TrainingArguments) -> Resumption:
    """What to resume. For `true` that is the last complete checkpoint of this run, which is the one whose id
    `output_dir` holds; without any, the run begins.

    Checkpoints are read to their ends: on one rank of a machine is enough.

    Raises:
        ValueError: it is not complete, all of this run are damaged, another engine has saved it, or DeepSpeed
            has cut it for another number of ranks.
    """
    option: str | bool | None = args.resume_from_checkpoint
    word = str(option).lower()
    if option is None or word == "false":
        return Resumption()
    folder = Path(args.output_dir or ".")
    found = _last_of_run(folder) if word == "true" else _named(folder, Path(str(option)))
    if found.checkpoint is not None:
        _refuse_other_engine(found.checkpoint, engine_name(args))
        _refuse_other_ranks(found.checkpoint, num_launched_ranks())
    return found


def _last_of_run(folder: Path) -> Resumption:
    own = RunRecord.read(folder)
    passed_over: list[str] = []
    faults: list[str] = []
    for path in _newest_first(folder):
        record = RunRecord.read(path)
        if own is not None and (record is None or record.run != own.run):
            passed_over.append(f"{path.name} is of another run")
            continue
        fault = _fault(path)
        if fault is None:
            run = record.run if record is not None else None
            return Resumption(checkpoint=path, run=run, passed_over=(*passed_over, *faults), was_asked=True)
        faults.append(f"{path.name}: {fault}")
    if faults:
        raise ValueError(
            f"resume_from_checkpoint=true, but {folder} holds no complete checkpoint of this run "
            f"({'; '.join(faults)}): leave the option out to begin afresh"
        )
    if own is not None and own.begun_from is not None:
        begun = _named(folder, Path(own.begun_from))
        return replace(begun, run=own.run, passed_over=tuple(passed_over))
    return Resumption(passed_over=tuple(passed_over), was_asked=True)


def _named(folder: Path, checkpoint: Path) -> Resumption:
    """The run that saved it goes on only from its last checkpoint: otherwise there would be two of each
    step."""
    fault = _fault(checkpoint)
    if fault is not None:
        raise ValueError(
            f"resume_from_checkpoint={checkpoint} is no complete checkpoint: {fault}; write true for the "
            "last complete one of output_dir"
        )
    own, record = RunRecord.read(folder), RunRecord.read(checkpoint)
    run = None
    if own is not None and record is not None and own.run == record.run:
        last = next((path for path in _newest_first(folder) if run_of(path) == own.run), checkpoint)
        run = own.run if last.resolve() == checkpoint.resolve() else None
    return Resumption(checkpoint=checkpoint, run=run, was_asked=True)


def delete_older(folder: Path, limit: int | None, *, newest: Path, best: str | None) -> None:
    """Leaves `limit` checkpoints of the run that has saved `newest`, among them that one and the best.
    Those of other runs stay: transformers would count them, and delete by their step or age."""
    if limit is None or limit <= 0:
        return
    run = run_of(newest)
    own = [path for path in _newest_first(folder) if run_of(path) == run]
    kept = [path for path in own if path == newest or (best is not None and path == Path(best))]
    others = [path for path in own if path not in kept]
    for path in others[max(0, limit - len(kept)) :]:
        shutil.rmtree(path, ignore_errors=True)


def _newest_first(folder: Path) -> list[Path]:
    paths = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir() and _step(path) >= 0]
    return sorted(paths, key=_step, reverse=True)


def run_of(checkpoint: Path) -> str | None:
    record = RunRecord.read(checkpoint)
    return None if record is None else record.run


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
