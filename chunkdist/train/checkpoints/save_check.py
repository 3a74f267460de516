"""Everything that saving needs is tried before the first step, so that no trained model is lost at the
end."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import ADAPTER_CONFIG_NAME

from chunkdist.train.checkpoints.model_parts import first_words, small_parts, weights_name
from chunkdist.train.checkpoints.run_record import RECORD
from chunkdist.train.checkpoints.saving import UNFINISHED, is_disk_full, removed_if_empty
from chunkdist.train.checkpoints.whole import UNFINISHED as UNFINISHED_CHECKPOINT
from chunkdist.train.launch.agreement import agreed
from chunkdist.train.launch.output import print_once

if TYPE_CHECKING:
    from transformers import Trainer

_LONGEST_NAME = (
    f"{PREFIX_CHECKPOINT_DIR}-{10**9}/global_step{10**9}/bf16_zero_pp_rank_1000_mp_rank_00_optim_states.pt"
)
"""No path that a checkpoint needs is longer."""
_SAMPLING = (
    *("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"),
    *("penalty_alpha", "length_penalty", "early_stopping"),
)


def try_saving(trainer: Trainer, model_name: str) -> None:
    """As `check_saving`, on the rank that saves; says what was mended. Collective.

    Raises:
        ValueError: on all ranks.
    """

    def on_one_rank() -> None:
        for line in check_saving(trainer, model_name) if trainer.args.should_save else ():
            print_once(line)

    agreed(on_one_rank)


def check_saving(trainer: Trainer, model_name: str) -> list[str]:
    """Tries to write into `output_dir` everything but the weights, in a folder that goes away again. Returns
    what a person is told of values that were mended.

    Args:
        model_name: The `model_name_or_path`.

    Raises:
        ValueError: something could not be saved; says what, and what to do.
    """
    output = Path(trainer.args.output_dir or ".")
    _refuse_empty_pushes(trainer)
    trial = output / UNFINISHED
    try:
        _refuse_own_folder(output, model_name)
        _refuse_earlier_adapter(output, trainer)
        said = _mend_generation_config(trainer)
        with removed_if_empty(output):
            output.mkdir(parents=True, exist_ok=True)
            for folder in (trial, output / UNFINISHED_CHECKPOINT):
                _make_empty(folder)
            try:
                longest = output / UNFINISHED_CHECKPOINT / _LONGEST_NAME
                longest.parent.mkdir(parents=True)
                longest.write_bytes(b"written to see whether it can be")
                trial.mkdir()
                _try_parts(trainer, trial)
                _refuse_in_the_way(output, trial, trainer)
            finally:
                shutil.rmtree(trial, ignore_errors=True)
                shutil.rmtree(output / UNFINISHED_CHECKPOINT, ignore_errors=True)
    except OSError as error:
        if is_disk_full(error):
            raise
        raise ValueError(
            f"output_dir={str(output)!r} cannot be written: {error.strerror or first_words(error)}"
            f"{f' ({error.filename})' if error.filename not in (None, str(output)) else ''}; write "
            "another folder"
        ) from error
    return said


def _refuse_own_folder(output: Path, model_name: str) -> None:
    if Path(model_name).is_dir() and output.exists() and os.path.samefile(model_name, output):
        raise ValueError(
            f"output_dir={str(output)!r} is model_name_or_path: the trained model would overwrite the "
            "one that it began with, and the run could not be begun again; write another folder"
        )


def _refuse_empty_pushes(trainer: Trainer) -> None:
    """FSDP2's checkpoints have shards only, and transformers (5.23) pushes the whole files that it finds."""
    args: Any = trainer.args
    if args.push_to_hub and trainer.is_fsdp_enabled and args.hub_strategy != "end":
        raise ValueError(
            f"hub_strategy={args.hub_strategy.value} with FSDP2: checkpoints hold no whole weights, and "
            "everything else would be pushed; write hub_strategy: end"
        )


def _refuse_earlier_adapter(output: Path, trainer: Trainer) -> None:
    if not isinstance(trainer.model, PeftModel) and (output / ADAPTER_CONFIG_NAME).exists():
        raise ValueError(
            f"output_dir={str(output)!r} holds the adapter of an earlier run ({ADAPTER_CONFIG_NAME}), "
            "and a whole model is trained: from_pretrained would put the adapter on it; write another "
            "folder, or move it away"
        )


def _mend_generation_config(trainer: Trainer) -> list[str]:
    """transformers reads some files that it refuses to write: with values for sampling, and without
    sampling."""
    model: Any = trainer.model
    config = getattr(model, "generation_config", None)
    if isinstance(model, PeftModel) or config is None:
        return []
    try:
        config.validate(strict=True)
        return []
    except ValueError as error:
        reason = first_words(error)
    dropped = []
    if not config.do_sample:
        fresh = type(config)()
        for name in _SAMPLING:
            if getattr(config, name, None) != getattr(fresh, name, None):
                dropped.append(f"{name}={getattr(config, name)}")
                setattr(config, name, getattr(fresh, name, None))
    try:
        config.validate(strict=True)
    except ValueError:
        raise ValueError(
            f"generation_config.json of the model cannot be saved again: {reason}: mend the file, or "
            "delete it"
        ) from None
    return [
        f"generation_config.json has {', '.join(dropped)} without do_sample, which transformers reads "
        "and refuses to write: left out of the saved model"
    ]


def _try_parts(trainer: Trainer, folder: Path) -> None:
    for name, save in small_parts(trainer).items():
        try:
            save(folder)
        except OSError:
            raise
        except Exception as error:
            raise ValueError(
                f"the trained model could not be saved, {name} cannot be written: {first_words(error)}"
            ) from error


def _refuse_in_the_way(output: Path, trial: Path, trainer: Trainer) -> None:
    """A file of the model cannot take the place of a folder, nor a checkpoint that of a file."""
    names = {path.name for path in trial.iterdir() if path.is_file()}
    names |= {weights_name(trainer.model), f"{weights_name(trainer.model)}.index.json", RECORD}
    for name in sorted(names):
        path = output / name
        if path.is_dir():
            raise ValueError(
                f"{path} is a folder, and a file of that name is to be saved: move it, or write another "
                "output_dir"
            )
    if trainer.args.save_strategy == "no":
        return
    for path in sorted(output.glob(f"{PREFIX_CHECKPOINT_DIR}-*")):
        is_named = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", path.name)
        if is_named and not path.is_dir():
            raise ValueError(
                f"{path} is no folder, and a checkpoint may get that name: move it, or write another "
                "output_dir"
            )


def _make_empty(folder: Path) -> None:
    """What an earlier run left half-written is of no use."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ValueError(f"{folder} is in the way of what is being saved: remove it")
    if folder.exists():
        shutil.rmtree(folder)
