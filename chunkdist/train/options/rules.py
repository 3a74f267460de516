"""What kind of value an option takes, and in which range: the kind from the dataclasses, the range from one
table.

transformers' and TRL's dataclasses take any number, and what comes from a YAML file they take unseen: a
negative rate trains away from the data, 0 samples a batch fail much later, a list fails anywhere.
"""

from __future__ import annotations

import math
import types
from argparse import Namespace
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from transformers.trainer_pt_utils import AcceleratorConfig

from chunkdist.sharding.refuse_sequence import refuse_parallelism_config
from chunkdist.train.options.json_options import read_json, read_json_file

_NONE = type(None)


@dataclass(frozen=True, kw_only=True)
class Range:
    """Numbers from `low` to `high`; NaN is in none."""

    low: float
    high: float = math.inf
    has_low: bool = True
    has_high: bool = True
    takes_infinity: bool = False
    or_word: str = ""
    """What else may be written, for the message."""

    def holds(self, value: float) -> bool:
        if math.isinf(value) and not self.takes_infinity:
            return False
        above = value >= self.low if self.has_low else value > self.low
        below = value <= self.high if self.has_high else value < self.high
        return above and below

    def wanted(self) -> str:
        low = f"{self.low:g} or more" if self.has_low else f"more than {self.low:g}"
        if not math.isinf(self.high):
            low = f"{'from' if self.has_low else 'above'} {self.low:g}"
            low += f" to {self.high:g}" if self.has_high else f" to less than {self.high:g}"
        return f"write {low}{self.or_word}"


COUNT, NOT_NEGATIVE, POSITIVE = Range(low=1), Range(low=0), Range(low=0, has_low=False)
_SHARE = Range(low=0, high=1, has_high=False)

RANGES: dict[str, Range] = {
    "spaco_budget": COUNT,
    "spaco_cap": POSITIVE,
    "corpus_max_bytes": COUNT,
    "per_device_train_batch_size": COUNT,
    "per_device_eval_batch_size": COUNT,
    "gradient_accumulation_steps": COUNT,
    "sequence_parallel_size": COUNT,
    "eval_accumulation_steps": COUNT,
    "save_total_limit": Range(low=1, or_word=", or leave it out to keep all"),
    "torch_empty_cache_steps": COUNT,
    "dataloader_prefetch_factor": COUNT,
    "dataloader_num_workers": NOT_NEGATIVE,
    "dataset_num_proc": COUNT,
    "ddp_bucket_cap_mb": COUNT,
    "ddp_timeout": COUNT,
    "pipeline_stages": COUNT,
    "context_length": COUNT,
    "max_length": Range(low=2, or_word=", or null for no limit; less leaves no token to predict"),
    "max_steps": Range(low=-1, or_word=": -1 to train for num_train_epochs"),
    "learning_rate": NOT_NEGATIVE,
    "warmup_steps": Range(low=0, or_word=": steps, or below 1 a share of them"),
    "weight_decay": NOT_NEGATIVE,
    "adam_beta1": _SHARE,
    "adam_beta2": _SHARE,
    "adam_epsilon": NOT_NEGATIVE,
    # Clipping at infinity is how norms are logged without clipping.
    "max_grad_norm": Range(low=0, takes_infinity=True, or_word="; 0 is no clipping"),
    "label_smoothing_factor": Range(low=0, high=1),
    "neftune_noise_alpha": NOT_NEGATIVE,
    "router_aux_loss_coef": NOT_NEGATIVE,
    "logging_steps": NOT_NEGATIVE,
    "eval_steps": NOT_NEGATIVE,
    "save_steps": NOT_NEGATIVE,
    "eval_delay": NOT_NEGATIVE,
    "seed": Range(low=0, high=2**32 - 1),
    "data_seed": Range(low=-(2**63), high=2**64 - 1),
    "local_rank": Range(low=-1),
    "lora_r": COUNT,
    "lora_alpha": COUNT,
    "lora_dropout": _SHARE,
    "test_split_size": Range(low=0, high=1, has_low=False, has_high=False),
}
"""The range of every option that is a number, but `num_train_epochs`, which counts only without
`max_steps`."""

_STRATEGY_OF = {
    "logging_steps": "logging_strategy",
    "eval_steps": "eval_strategy",
    "save_steps": "save_strategy",
}
_NULL_TOO = {"max_grad_norm", "debug", "model_revision"}
"""Options that transformers takes null for, against their annotation."""
_LIST_TOO = {"fsdp"}
"""Likewise of lists."""
_WORDS = {
    "include_num_input_tokens_seen": ("true", "false", "all", "non_padding", "no"),
    "torch_compile_mode": ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
}
_FILES = {"accelerator_config", "fsdp_config", "deepspeed"}
"""Mappings that may be a JSON file."""
_KEYS = {
    "accelerator_config": {field.name for field in fields(AcceleratorConfig)},
    "dataset_kwargs": {"skip_prepare_dataset"},
}
_NEEDED = {
    "use_peft": (
        "lora_r",
        "lora_alpha",
        "lora_dropout",
        "lora_target_modules",
        "lora_target_parameters",
        "lora_modules_to_save",
        "lora_task_type",
        "use_rslora",
        "use_dora",
    ),
    "load_in_4bit": ("bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage"),
}
"""What must be true for other options to mean anything."""
_INSTEAD = {"use_peft": "all weights would be trained", "load_in_4bit": "weights would not be quantised"}


def is_bool_or_word(hint: Any) -> bool:
    """Whether an option is true, false or a word."""
    parts = _parts(hint)
    has_bool = bool in parts or any(get_origin(part) is Literal for part in parts)
    return has_bool and str in parts


def bool_or_word(text: str) -> bool | str:
    """What is written for such an option."""
    return {"true": True, "yes": True, "1": True, "false": False, "0": False}.get(text.lower(), text)


def check_values(values: Namespace, given: set[str], types_of_options: Iterable[Any]) -> None:
    """Refuses values of a wrong kind or out of range, before a dataclass is made of them.

    Args:
        values: The values of all options.
        given: Names of the options that the user has written.
        types_of_options: The dataclasses.

    Raises:
        ValueError: names the option, its value, and what to write.
    """
    hints = {name: hint for kind in types_of_options for name, hint in get_type_hints(kind).items()}
    for name in sorted(given & set(hints)):
        value = getattr(values, name)
        _check_kind(name, value, hints[name])
        if any(
            "\0" in text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)
        ):
            raise ValueError(f"{name}={_short(value)} holds a NUL character, which no name has: take it out")
        if isinstance(value, list | dict) and _holds_nan(value):
            raise ValueError(f"{name}={_short(value)} holds NaN: write a number")
        _check_mapping(name, value, hints[name])
        if name in RANGES and isinstance(value, int | float) and not isinstance(value, bool):
            _check_range(name, value, RANGES[name])
        if name in _WORDS and isinstance(value, str) and value not in _WORDS[name]:
            raise ValueError(f"{name}={value!r}: write one of {', '.join(_WORDS[name])}")
    _check_together(values, given)


def _check_kind(name: str, value: Any, hint: Any) -> None:
    parts = _parts(hint)
    if name == "parallelism_config" and value is not None:
        refuse_parallelism_config(value)
        raise ValueError(
            "parallelism_config is not taken: what shards a chunked run is DDP, FSDP2, ZeRO or "
            "pipeline_stages; leave it out"
        )
    if value is None:
        if _NONE not in parts and name not in _NULL_TOO:
            raise ValueError(f"{name} is null, and is to be {_kind_name(hint)}: write one, or leave it out")
    elif isinstance(value, list):
        kinds = [part for part in parts if get_origin(part) is list or part is list]
        if name in _LIST_TOO:
            kinds = [list]
        if not kinds:
            raise ValueError(f"{name}={_short(value)} is a list, and is to be {_kind_name(hint)}")
        element = next(iter(get_args(kinds[0])), str)
        for part in value:
            if is_dataclass(element) and not isinstance(part, dict):
                raise ValueError(f"{name} holds {part!r}: write a list of mappings, each with a path")
            if part is None or (isinstance(part, list | dict) and not is_dataclass(element)):
                raise ValueError(f"{name}={_short(value)} holds {part!r}: write a list of words")
    elif isinstance(value, dict) and not _takes_mapping(hint):
        raise ValueError(f"{name}={_short(value)} is a mapping, and is to be {_kind_name(hint)}")


def _check_mapping(name: str, value: Any, hint: Any) -> None:
    """Reads a mapping that is written as JSON, or in a JSON file, to see that it is one."""
    if isinstance(value, str) and _takes_mapping(hint):
        value = _parsed(name, value)
    for key in value if isinstance(value, dict) else ():
        if name in _KEYS and key not in _KEYS[name]:
            raise ValueError(f"{name} has {key!r}, and knows only {', '.join(sorted(_KEYS[name]))}")


def _parsed(name: str, text: str) -> Any:
    if text.lstrip().startswith("{"):
        return read_json(text, where=name)
    if name not in _FILES:
        raise ValueError(f"{name}={text!r} is no mapping: write 'key: value' lines below it, or JSON")
    if name == "deepspeed":
        return text  # looked at where its contents are
    return read_json_file(Path(text), name)


def _check_range(name: str, value: float, allowed: Range) -> None:
    if not allowed.holds(value):
        raise ValueError(f"{name}={value}: {allowed.wanted()}")


def _check_together(values: Namespace, given: set[str]) -> None:
    if values.max_steps == 0:
        raise ValueError("max_steps=0 would train a step all the same: write at least 1, or -1 for epochs")
    epochs = values.num_train_epochs
    if math.isnan(epochs) or math.isinf(epochs) or (epochs <= 0 and values.max_steps < 1):
        raise ValueError(f"num_train_epochs={epochs} trains nothing: write more than 0, or max_steps")
    for name, strategy in _STRATEGY_OF.items():
        steps = getattr(values, name)
        if name in given and steps == 0 and str(getattr(values, strategy)) == "steps":
            raise ValueError(f"{name}=0 with {strategy}=steps: write more than 0, or {strategy}: 'no'")
    for needed, names in _NEEDED.items():
        without = sorted(given & set(names))
        if without and not getattr(values, needed):
            raise ValueError(
                f"{', '.join(without)} without {needed}: {_INSTEAD[needed]}; write {needed}: true, or leave "
                "them out"
            )
    if "rope_extension" in given and values.context_length is None:
        raise ValueError(
            f"rope_extension={values.rope_extension} without context_length, which says for how many tokens: "
            "write it, or leave both out"
        )
    _check_padding(getattr(values, "pad_to_multiple_of", None))
    if values.optim_args and any("=" not in part for part in str(values.optim_args).split(",")):
        raise ValueError(f"optim_args={values.optim_args!r}: write name=value,name=value")


def _check_padding(value: Any) -> None:
    if value is None or str(value).lower() in ("auto", "none", "null"):
        return
    if not str(value).isdecimal() or int(value) < 1:
        raise ValueError(f"pad_to_multiple_of={value}: write a count of tokens, auto or null")


def _holds_nan(value: Any) -> bool:
    if isinstance(value, list | dict):
        return any(map(_holds_nan, value.values() if isinstance(value, dict) else value))
    return isinstance(value, float) and math.isnan(value)


def _takes_mapping(hint: Any) -> bool:
    return any(get_origin(part) is dict or part is dict for part in _parts(hint))


def _parts(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _kind_name(hint: Any) -> str:
    names: Mapping[Any, str] = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "a word",
        list: "a list",
        dict: "a mapping",
    }
    found = [names.get(get_origin(part) or part, "a word") for part in _parts(hint) if part is not _NONE]
    return " or ".join(dict.fromkeys(found))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
