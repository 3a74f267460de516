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

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from chunkdist.integrations.saving import whole_or_absent

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
            _flush(written)
        wait_for_everyone()
    if moves:
        with suppress(FileNotFoundError):  # moved by another machine that shares the disk
            if target.exists() and written.exists():
                os.rename(target, parent / f"{target.name}-before")
            os.rename(written, target)
        shutil.rmtree(parent, ignore_errors=True)
    wait_for_everyone()


def checkpoint_to_resume(option: str | bool | None, output_dir: str | None, num_ranks: int) -> Path | None:
    """The checkpoint that `resume_from_checkpoint` means: for `true` the last complete one of `output_dir`.

    Raises:
        ValueError: it is not complete, there is none, or DeepSpeed has cut it for another number of ranks.
    """
    word = str(option).lower()
    if option is None or word == "false":
        return None
    folder = Path(output_dir or ".")
    if word == "true":
        found = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if _is_complete(path)]
        if not found:
            raise ValueError(
                f"resume_from_checkpoint=true, but {folder} holds no complete checkpoint: leave the "
                "option out to begin afresh"
            )
        checkpoint = max(found, key=_step)
    else:
        checkpoint = Path(str(option))
        if not _is_complete(checkpoint):
            raise ValueError(
                f"resume_from_checkpoint={checkpoint} is no complete checkpoint: it has no "
                f"{TRAINER_STATE_NAME}, or was still being written; write "
                "true for the last complete one of output_dir"
            )
    _refuse_other_ranks(checkpoint, num_ranks)
    return checkpoint


def resume_line(checkpoint: Path, num_ranks: int) -> str:
    """What is resumed, and what cannot be as it was."""
    saved = max(1, len(list(checkpoint.glob("rng_state_*.pth"))))
    if saved == num_ranks:
        return f"resuming from {checkpoint}"
    return (
        f"resuming from {checkpoint} of {saved} ranks on {num_ranks}: random draws begin afresh, and a step "
        "has the same samples only if ranks x per_device_train_batch_size x gradient_accumulation_steps is "
        "what it was"
    )


def _is_complete(path: Path) -> bool:
    return (path / TRAINER_STATE_NAME).is_file() and UNFINISHED not in path.absolute().parts


def _step(path: Path) -> int:
    match = re.search(r"-(\d+)$", path.name)
    return int(match[1]) if match else -1


def _refuse_other_ranks(checkpoint: Path, num_ranks: int) -> None:
    """ZeRO's optimizer states are cut into as many pieces as there were ranks."""
    saved = len(list(checkpoint.glob("global_step*/*zero_pp_rank_*_mp_rank_00_optim_states.pt")))
    if saved in (0, num_ranks) or (checkpoint / "latest_universal").exists():
        return
    (folder,) = {path.name for path in checkpoint.glob("global_step*")}
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
