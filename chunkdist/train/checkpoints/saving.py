"""Saving that leaves a whole model or none: written beside the target, moved when it is complete."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from chunkdist.train.launch.agreement import any_rank

if TYPE_CHECKING:
    from transformers import Trainer

UNFINISHED = ".unfinished-model"
"""The folder inside the target that holds a model while it is being written."""
_FULL_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# safetensors and torch's zip writer turn the system's error into their own; only the text is left.
_FULL_TEXTS = (
    "No space left on device",
    "Disk quota exceeded",
    "File too large",
    "PytorchStreamWriter failed writing",
    "unexpected pos ",
    "iostream error",
)
_WEIGHT_ENDINGS = {".safetensors", ".bin"}
_LAST = {"config.json", "adapter_config.json"}


class DiskFullError(OSError):
    """A file could not be written to its end; the message says where, and what is left of it."""


class PartlySavedError(RuntimeError):
    """The trained weights are saved, and something beside them is not."""


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, is that a file system or a quota is full."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, DiskFullError) or getattr(error, "errno", None) in _FULL_ERRNOS:
            return True
        if any(text in str(error) for text in _FULL_TEXTS):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def whole_or_absent(folder: Path, *, what: str, is_writer: bool) -> Iterator[None]:
    """Removes `folder` when writing it fails, whatever the reason; a full disk becomes a DiskFullError.

    Args:
        folder: What is written inside the block.
        what: What it is, for the message.
        is_writer: Whether this process owns the folder.
    """
    existed = folder.exists()
    try:
        yield
    except BaseException as error:
        if is_writer and not existed:
            shutil.rmtree(folder, ignore_errors=True)
        if is_disk_full(error):
            raise DiskFullError(
                errno.ENOSPC,
                f"no space left to save the {what}, nothing half-written was kept",
                str(folder.parent),
            ) from error
        raise


def save_model(trainer: Trainer) -> Path:
    """Writes the trained model and its tokenizer into `output_dir`, so that `from_pretrained(output_dir)`
    loads them.

    Sharded weights are gathered: every process must call this. Until all files are written they are in a
    folder of their own; then they are moved, the config last.

    Raises:
        DiskFullError: there is no space; `output_dir` holds what it held before.
        PartlySavedError: the weights are saved, and something else is not: a config, the tokenizer, a push.
        RuntimeError: the sharding engine gave no weights.
    """
    target = Path(trainer.args.output_dir or ".")
    unfinished = target / UNFINISHED
    is_writer = bool(trainer.args.should_save)
    if is_writer:
        shutil.rmtree(unfinished, ignore_errors=True)
    fsdp = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if fsdp is not None:
        fsdp.set_state_dict_type("FULL_STATE_DICT")  # the sharded kind cannot be loaded by from_pretrained
    with whole_or_absent(unfinished, what="trained model", is_writer=is_writer):
        trainer.save_model(str(unfinished), _internal_call=True)  # any other call also pushes it to the Hub
        trainer.accelerator.wait_for_everyone()  # the others look into the folder, too
        if is_writer:
            if not any(path.suffix in _WEIGHT_ENDINGS for path in unfinished.rglob("*")):
                raise RuntimeError(
                    "no weights were gathered to be saved: under DeepSpeed ZeRO-3, write "
                    "stage3_gather_16bit_weights_on_model_save: true"
                )
            _move_all(unfinished, target)
    failed = getattr(trainer, "save_failures", [])
    if any_rank(bool(failed)):
        raise PartlySavedError(
            f"the trained weights are saved to {target}, but not "
            f"{'; '.join(failed) or 'all that belongs to them'}"
        )
    if trainer.args.push_to_hub:
        _push(trainer, target)
    return target


def _push(trainer: Trainer, target: Path) -> None:
    try:
        trainer.push_to_hub()
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise PartlySavedError(
            f"the model is saved to {target}, but not pushed to the Hub: {reason}"
        ) from error


def _move_all(source: Path, target: Path) -> None:
    for path in sorted(source.iterdir(), key=lambda path: (path.name in _LAST, path.name)):
        destination = target / path.name
        if destination.is_dir() and not destination.is_symlink() and path.is_dir():
            shutil.rmtree(destination)  # a second adapter's folder
        os.replace(path, destination)
    source.rmdir()


@contextmanager
def removed_if_empty(folder: str | os.PathLike[str] | None) -> Iterator[None]:
    """Takes away a folder, and those above it, that the block made and left empty when it failed."""
    path = Path(folder or ".").absolute()
    made = [candidate for candidate in (path, *path.parents) if not candidate.exists()]
    try:
        yield
    except BaseException:
        for candidate in made:
            with suppress(OSError):  # not empty, or another process was faster
                candidate.rmdir()
        raise
