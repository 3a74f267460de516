"""A model whose weights are all in its files, or the user has written that they need not be.

transformers draws what is missing at random and leaves out what it has no place for; it says so in a table
among its other lines, and trains on.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.utils import (
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)
from trl.trainer.utils import create_model_from_path

from chunkdist.recovery import is_out_of_memory
from chunkdist.sharding.zero3 import whole_weights
from chunkdist.train.launch.output import first_line, print_once
from chunkdist.train.options.json_options import read_json_file

_NUM_NAMED = 3
_REPORT = "LOAD REPORT"
"""The first line of the table that transformers 5.23 logs; a line of ours says the same."""


def load_model(
    name: str,
    *,
    allow_missing: bool,
    replaced: tuple[str, ...] = (),
    hf_deepspeed_config: Any = None,
    **given: Any,
) -> Any:
    """The model of a folder or a name on the Hub, loaded as TRL loads it.

    Args:
        allow_missing: Whether weights may be drawn at random, or left out, where files and config differ.
        replaced: Beginnings of the names of weights that the model is to have anew, or to leave out.
        hf_deepspeed_config: The training arguments' attribute. Under ZeRO-3 transformers (5.23) does not say
            what it leaves out, and is asked once more, without the weights.
        given: Goes to `from_pretrained`.

    Raises:
        ValueError: a file is no whole file of weights, or files and config differ; says what is missing.
    """
    if Path(name).is_dir():
        _refuse_broken_files(Path(name))
        _refuse_broken_configs(Path(name), needs_architecture=given.get("architecture") is None)
    takes_other_shapes = allow_missing or given.pop("ignore_mismatched_sizes", False)
    try:
        with _without_report():
            settings: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True, **given}
            load: Callable[..., Any] = partial(create_model_from_path, name, **settings)
            is_quantized = given.get("quantization_config") is not None  # then ZeRO-3 takes no part
            report = None if is_quantized else _report_without_weights(load, hf_deepspeed_config)
            model, own_report = load()
    except Exception as error:
        is_of_system = isinstance(error, MemoryError) or (
            isinstance(error, OSError) and error.errno is not None
        )
        if is_of_system or is_out_of_memory(error):  # not of what the user wrote
            raise
        raise ValueError(f"model_name_or_path={name!r} cannot be loaded: {first_line(error)}") from error
    report = own_report if report is None else report
    for kind in ("missing_keys", "unexpected_keys"):
        report[kind] = {key for key in report[kind] if not key.startswith(replaced)}
    faults = _differences(report, with_shapes=not takes_other_shapes)
    if faults and not allow_missing:
        raise ValueError(
            f"model_name_or_path={name!r}: {'; '.join(faults)}: take the config.json that belongs to the "
            "files, or write allow_missing_weights: true to train from there"
        )
    for fault in _differences(report, with_shapes=True):
        print_once(f"model_name_or_path={name!r}: {fault} (allow_missing_weights)")
    return model


def _report_without_weights(load: Callable[..., Any], hf_deepspeed_config: Any) -> dict[str, Any] | None:
    """What transformers says of files and model without ZeRO-3; `None` where that is off."""
    if hf_deepspeed_config is None or not is_deepspeed_zero3_enabled():
        return None
    with whole_weights(hf_deepspeed_config):
        _, report = load(device_map="meta")
    return dict(report)


def _differences(report: dict[str, Any], *, with_shapes: bool) -> list[str]:
    """What files and model do not have in common, a short text each."""
    faults = []
    if missing := report["missing_keys"]:
        faults.append(f"its files lack {_counted(missing)}, which would be drawn at random")
    if with_shapes and (shapes := sorted(report["mismatched_keys"])):
        key, in_files, in_model = shapes[0]
        faults.append(
            f"{len(shapes)} weight(s) have another shape, which would be drawn at random: {key} is "
            f"{list(in_files)} in its files, {list(in_model)} by its config.json"
        )
    if unexpected := report["unexpected_keys"]:
        faults.append(f"its files hold {_counted(unexpected)} that the model has no place for")
    return faults


def _counted(keys: Collection[str]) -> str:
    named = ", ".join(sorted(keys)[:_NUM_NAMED])
    return f"{len(keys)} weight(s) ({named}{', ...' if len(keys) > _NUM_NAMED else ''})"


def _refuse_broken_configs(folder: Path, *, needs_architecture: bool) -> None:
    """transformers (5.23) takes a generation_config.json that it cannot read for one that is not there."""
    generation, config = folder / GENERATION_CONFIG_NAME, folder / CONFIG_NAME
    if generation.exists():
        read_json_file(generation, GENERATION_CONFIG_NAME)
    if (
        needs_architecture
        and config.exists()
        and not read_json_file(config, CONFIG_NAME).get("architectures")
    ):
        raise ValueError(
            f"{config} has no architectures, so that nobody knows the class of the model: write it, as "
            '"architectures": ["LlamaForCausalLM"]'
        )


def _refuse_broken_files(folder: Path) -> None:
    """Raises for the first of the files that hold the weights which is not whole; reads their headers only.

    Where a folder has several kinds of files, transformers takes the first of these.
    """
    for weights, index in ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
        if (folder / weights).exists():
            files = [folder / weights]
        elif (folder / index).exists():
            files = _shards(folder / index)
        else:
            continue
        for file in files:
            _refuse_broken_file(file)
        return


def _shards(index: Path) -> list[Path]:
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return [index.parent / name for name in sorted(set(names))]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is no index of weights ({first_line(error)}): copy it again") from error


def _refuse_broken_file(file: Path) -> None:
    if not file.is_file():
        raise ValueError(f"{file} is missing or no file, but the model's weights are in it: copy it again")
    if file.suffix != ".safetensors":
        return  # torch looks at a pickled file as a whole
    try:
        with safe_open(str(file), framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file} is no whole file of weights ({first_line(error)}): copy it again"
        ) from error


@contextmanager
def _without_report() -> Iterator[None]:
    """Keeps transformers' table of what it has loaded off the screen."""

    def is_other(record: logging.LogRecord) -> bool:
        return _REPORT not in record.getMessage()

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)
