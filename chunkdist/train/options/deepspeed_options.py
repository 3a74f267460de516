"""`deepspeed` and what a launcher says, against the options of the run: where they are at odds, one would be
ignored, or the run would fail after the model is loaded."""

from __future__ import annotations

import base64
import importlib.util
import os
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from chunkdist.sharding.refuse_sequence import refuse_parallelism_config
from chunkdist.train.options.json_options import read_json, read_json_file

if TYPE_CHECKING:
    from transformers import TrainingArguments

_STAGES = (0, 1, 2, 3)
_SECTIONS = ("zero_optimization", "bf16", "fp16", "optimizer", "scheduler")
_COUNTS = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")
_ACCELERATE_DEEPSPEED, _ACCELERATE_PRECISION = "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_MIXED_PRECISION"


def check_deepspeed(values: Namespace) -> None:
    """Refuses a DeepSpeed config that cannot be read, or a process that no launcher has started.

    Called before the dataclasses are made: transformers reads the config and makes a process group there.

    Raises:
        ValueError: names the file or the key.
    """
    if not values.deepspeed:
        if os.environ.get(_ACCELERATE_DEEPSPEED, "false").lower() == "true":
            raise ValueError(
                "Accelerate's config asks for DeepSpeed, and deepspeed is not set: write deepspeed: FILE, or "
                "distributed_type: MULTI_GPU in Accelerate's config"
            )
        return
    config = _read(values.deepspeed)
    for name in _SECTIONS:
        if not isinstance(config.get(name, {}), dict):
            raise ValueError(f"deepspeed: {name}={config[name]!r} is to be a mapping")
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if isinstance(stage, bool) or stage not in _STAGES:
        raise ValueError(f"deepspeed: zero_optimization.stage={stage!r}: write 0, 1, 2 or 3")
    refuse_parallelism_config(None, SimpleNamespace(get_value=config.get))
    for name in _COUNTS:
        count = config.get(name, "auto")
        if count != "auto" and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
            raise ValueError(f"deepspeed: {name}={count!r}: write auto, or a whole number of at least 1")
    if values.fsdp and str(values.fsdp).lower() != "false":
        raise ValueError(f"deepspeed and fsdp={values.fsdp!r} are both set: write one of them")
    if importlib.util.find_spec("deepspeed") is None:
        raise ValueError("deepspeed is set, and the package is not installed: pip install deepspeed")
    if "LOCAL_RANK" not in os.environ and importlib.util.find_spec("mpi4py") is None:
        raise ValueError(
            "deepspeed is set, and no launcher has started this process: start it with `deepspeed "
            "launchers/train.py ...`, accelerate launch or torchrun, or leave deepspeed out"
        )


def check_at_odds(training: TrainingArguments) -> None:
    """Refuses a DeepSpeed config, or settings of Accelerate's, that say something else than the options.

    Raises:
        ValueError: names both sides.
    """
    deepspeed: Any = getattr(training, "hf_deepspeed_config", None)
    if deepspeed is not None and deepspeed.mismatches:
        told = "; ".join(mismatch.removeprefix("- ds ") for mismatch in deepspeed.mismatches)
        raise ValueError(
            f"deepspeed's config is at odds with the options ({told.replace(' vs hf ', ' against ')}): write "
            '"auto" in the config'
        )
    asked = os.environ.get(_ACCELERATE_PRECISION, "no").lower()
    own = "bf16" if training.bf16 else "fp16" if training.fp16 else "no"
    if asked not in ("no", "", own):
        raise ValueError(
            f"mixed_precision: {asked} in Accelerate's config is at odds with bf16={training.bf16} and "
            f"fp16={training.fp16}: write mixed_precision: 'no' there, and what is wanted in the options"
        )


def _read(given: Any) -> Mapping[str, Any]:
    if isinstance(given, dict):
        return given
    text = str(given)
    if text.lstrip().startswith("{"):
        return dict(read_json(text, where="deepspeed"))
    path = Path(text)
    if not os.path.exists(text):  # as a path, a long text would be an error
        try:
            decoded = base64.urlsafe_b64decode(text).decode("utf-8")  # as DeepSpeed's launchers pass a config
        except ValueError:
            raise ValueError(f"deepspeed={text!r} does not exist: write a JSON file or a mapping") from None
        return dict(read_json(decoded, where="deepspeed"))
    return dict(read_json_file(path, "deepspeed"))
