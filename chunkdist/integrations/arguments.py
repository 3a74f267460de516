"""The options of a training run: TRL's own, and the few of ours, by one name in YAML and on the command line.

What an option of `ChunkConfig` means is said in its docstring, and its default is set there, once.
"""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import inspect
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, get_args

import torch
import yaml
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig, TrlParser

from chunkdist.config import ATTENTION_NAMES, ChunkConfig
from chunkdist.data.samples import LongSamples
from chunkdist.integrations.packing import check_packing
from chunkdist.samplers import (
    ChunkSampler,
    FixedBudgetSampler,
    ImportanceSampler,
    IndependentSampler,
    RunSampler,
)
from chunkdist.sharding.launch import needs_gloo, skip_shm_build, tell_ranks

_KV_GRAD_DTYPES: dict[str, torch.dtype | None] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "model": None,
}
_SAMPLERS = {
    "independent": IndependentSampler,
    "importance": ImportanceSampler,
    "runs": RunSampler,
    "fixed": FixedBudgetSampler,
}


def _of_config(name: str, *, default: object = None, choices: tuple[str, ...] | None = None) -> Any:
    """A field whose value goes to `ChunkConfig`; help, and a default that is not given, come from there."""
    if default is None:
        default = inspect.signature(ChunkConfig).parameters[name].default
    match = re.search(
        rf"^ {{8}}{name}: (.*?)(?=^ {{8}}\w+: |^ {{4}}\w+:|\Z)", ChunkConfig.__doc__ or "", re.S | re.M
    )
    assert match, f"ChunkConfig's docstring does not tell about {name}"
    help_text = " ".join(match[1].split()).replace("`", "").replace("%", "%%")
    return _option(default, help_text, choices=choices)


def _option(default: object, help_text: str, choices: tuple[str, ...] | None = None) -> Any:
    return field(default=default, metadata={"help": help_text} | ({"choices": choices} if choices else {}))


@dataclass(frozen=True, kw_only=True)
class ChunkArguments:
    """How the model is chunked; `chunk_config` says it in the library's own terms."""

    chunk_method: str = _option(
        "seco",
        "seco: exact gradients, chunk by chunk. spaco: unbiased ones, of a sample of the chunks. none: plain "
        "TRL, to "
        "compare with.",
        choices=("seco", "spaco", "none"),
    )
    chunk_size: int = _of_config("chunk_size", default=4096)
    layers_per_group: str = _of_config("layers_per_group", default="1")
    retained_chunks: str = _of_config("retained_chunks", default="0")
    chunk_packing: bool = _option(
        False, "Join whole sequences to streams without padding, and spread them over ranks by cost."
    )
    chunk_kv_grad_dtype: str = _of_config("kv_grad_dtype", default="float32", choices=tuple(_KV_GRAD_DTYPES))
    chunk_offload: str = _of_config("offload", choices=("none", "host", "auto"))
    chunk_attention: str = _of_config("attention", choices=ATTENTION_NAMES)
    chunk_rebuild_kv: str = _of_config("rebuild_kv", choices=("auto", "true", "false"))
    spaco_sampler: str = _option(
        "independent",
        "independent: every chunk with the same probability. importance: in proportion to the norm of its "
        "output gradient. runs: neighbouring chunks together. fixed: the paper's, biased.",
        choices=tuple(_SAMPLERS),
    )
    spaco_budget: int = _option(8, "How many chunks of a sequence are backpropagated, on average.")
    spaco_cap: float | None = _option(None, "Upper bound of the fixed sampler's factor (2 in the paper).")
    chunk_check: bool = _option(
        True, "Before training, compare the gradients of a short sample with those of the unchunked model."
    )

    def chunk_config(self) -> ChunkConfig | None:
        """The library's config; `None` for `chunk_method=none`.

        Raises:
            ValueError, NotImplementedError: a value is out of range, or not built yet.
        """
        if self.chunk_method == "none":
            return None
        rebuild_kv: Any = {"true": True, "false": False}.get(self.chunk_rebuild_kv, self.chunk_rebuild_kv)
        offload: Any = self.chunk_offload
        attention: Any = self.chunk_attention
        return ChunkConfig(
            chunk_size=self.chunk_size,
            layers_per_group=_count_or_word(self.layers_per_group),
            retained_chunks=_count_or_word(self.retained_chunks),
            kv_grad_dtype=_KV_GRAD_DTYPES[self.chunk_kv_grad_dtype],
            offload=offload,
            attention=attention,
            rebuild_kv=rebuild_kv,
            sampler=self._sampler(),
        )

    def _sampler(self) -> ChunkSampler | None:
        given = {
            name: value
            for name in ("spaco_sampler", "spaco_budget", "spaco_cap")
            if (value := getattr(self, name)) != inspect.signature(ChunkArguments).parameters[name].default
        }
        if self.chunk_method != "spaco":
            if given:
                raise ValueError(
                    f"{', '.join(given)} without chunk_method=spaco would be ignored: write chunk_method: "
                    "spaco"
                )
            return None
        if self.spaco_cap is None:
            sampler: ChunkSampler = _SAMPLERS[self.spaco_sampler](budget=self.spaco_budget)
            return sampler
        if self.spaco_sampler != "fixed":
            raise ValueError(
                f"spaco_cap={self.spaco_cap} with spaco_sampler={self.spaco_sampler}: a cap makes an "
                "unbiased sampler "
                "biased; leave it out, or write spaco_sampler: fixed"
            )
        return FixedBudgetSampler(budget=self.spaco_budget, cap=self.spaco_cap)


@dataclass
class DataArguments(ScriptArguments):
    """TRL's dataset options, and what becomes of samples that do not fit."""

    long_samples: str = _option(
        "error",
        "What becomes of a sample longer than max_length: error (before training), truncate, split (plain "
        "text only), or drop. What was done is said.",
        choices=get_args(LongSamples),
    )
    corpus_max_bytes: int = _option(
        4_000_000, "How much of the interpreter's standard library dataset_name: python-stdlib reads."
    )


@dataclass
class TrainArguments(SFTConfig):
    """TRL's `SFTConfig`, with Hugging Face's gradient checkpointing off: a chunked step is its own."""

    # `None`, not `False`: recent versions of transformers take any other value for the deprecated spelling.
    gradient_checkpointing: bool | None = _option(  # type: ignore[assignment]
        None, "Hugging Face's gradient checkpointing, for chunk_method: none. A chunked step excludes it."
    )

    def __post_init__(self) -> None:
        if self.deepspeed and needs_gloo():
            skip_shm_build()
        elif needs_gloo():
            self.use_cpu = True
        super().__post_init__()  # type: ignore[no-untyped-call]
        if self.deepspeed and needs_gloo():
            tell_ranks(self.distributed_state)

    def _validate_args(self) -> None:
        """For transformers, bf16 without a GPU needs `use_cpu`, which DeepSpeed must not be given."""
        given = self.use_cpu
        self.use_cpu = given or bool(self.deepspeed and needs_gloo())
        super()._validate_args()  # type: ignore[no-untyped-call]
        self.use_cpu = given


@dataclass
class ModelArguments(ModelConfig):
    """TRL's model options."""

    from_scratch: bool = _option(
        False,
        "Draw the weights from the model's config instead of loading them; model_name_or_path then is a "
        "folder (or a name on the Hub) with config.json and a tokenizer.",
    )


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Everything that one run was told."""

    chunk: ChunkArguments
    data: DataArguments
    training: TrainArguments
    model: ModelArguments
    mixture: DatasetMixtureConfig


class OptionParser(TrlParser):
    """TRL's parser; faults of YAML and command line alike are one line that names the option."""

    def __init__(self) -> None:
        types = (ChunkArguments, DataArguments, TrainArguments, ModelArguments, DatasetMixtureConfig)
        super().__init__(types, allow_abbrev=False)  # type: ignore[arg-type]  # TRL's annotation is a string

    def parse(self, arguments: Sequence[str] | None = None) -> TrainingOptions:
        """The options of a command line, `--config FILE.yaml` among them.

        Raises:
            ValueError: an unknown or unfit option, or an unreadable YAML file.
        """
        given = [part for argument in (arguments or []) for part in _split_config(argument)]
        if "--config" in given:
            _check_yaml(given[given.index("--config") + 1 : given.index("--config") + 2])
        try:
            *parsed, from_yaml, from_command_line = self.parse_args_and_config(
                given, return_remaining_strings=True, separate_remaining_strings=True
            )
        except TypeError as error:  # a value of a wrong kind that only a dataclass notices
            raise ValueError(f"an option has a value of a wrong kind: {error}") from error
        if "--config" in from_command_line:
            self.error("--config is given twice: write it once (`make train CONFIG=FILE`)")
        for unknown in [*from_yaml[::2], *(part for part in from_command_line if part.startswith("-"))]:
            self.error(f"unknown option {unknown.split('=')[0].lstrip('-')!r}{self._nearest(unknown)}")
        if from_command_line:
            self.error(f"{from_command_line[0]!r} belongs to no option: write --option value")
        chunk, data, training, model, mixture = parsed
        return TrainingOptions(chunk=chunk, data=data, training=training, model=model, mixture=mixture)

    def set_defaults_with_config(self, **values: Any) -> list[str]:
        """As TRL's, but values of a YAML file pass the checks that values of the command line pass."""
        actions = {action.dest: action for action in self._actions}
        for key, value in values.items():
            if key in actions:
                values[key] = self._checked(actions[key], key, value)
        return super().set_defaults_with_config(**values)

    def error(self, message: str) -> NoReturn:
        """Raises instead of printing the whole usage and leaving."""
        raise ValueError(message)

    def _checked(self, action: argparse.Action, key: str, value: Any) -> Any:
        if value is None or isinstance(value, dict) or (isinstance(value, list) and action.nargs is None):
            return value
        values = value if isinstance(value, list) else [value]
        values = [str(element).lower() if isinstance(element, bool) else element for element in values]
        if any(isinstance(element, (list, dict)) for element in values):
            return value
        try:
            checked = [self._get_value(action, str(element)) for element in values]
            for element in checked:
                self._check_value(action, element)
        except argparse.ArgumentError as fault:
            self.error(f"{key}: {value!r} in the config file: {fault.message}")
        return checked if isinstance(value, list) or action.nargs == "+" else checked[0]

    def _nearest(self, unknown: str) -> str:
        known = sorted({option.lstrip("-").replace("-", "_") for option in self._option_string_actions})
        name = unknown.split("=")[0].lstrip("-").replace("-", "_")
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        return f": did you mean {close[0]!r}?" if close else ": --help lists those that there are"


def parse_options(arguments: Sequence[str] | None = None) -> TrainingOptions:
    """The options of this process's command line, or of `arguments`."""
    return OptionParser().parse(sys.argv[1:] if arguments is None else arguments)


def check_options(options: TrainingOptions) -> ChunkConfig | None:
    """What can be said from the options alone. Returns the chunk config.

    Raises:
        ValueError, NotImplementedError: options exclude each other, or one would silently do harm.
    """
    chunk_config = options.chunk.chunk_config()
    training, model, data = options.training, options.model, options.data
    if chunk_config is not None and training.gradient_checkpointing:
        raise ValueError(
            "gradient_checkpointing=True: a chunked step is its own checkpointing, both would recompute "
            "twice; write "
            "gradient_checkpointing: false, or chunk_method: none"
        )
    if chunk_config is not None and training.router_aux_loss_coef:
        raise ValueError(
            f"router_aux_loss_coef={training.router_aux_loss_coef}: chunked layers hand out no router "
            "logits; write 0.0"
        )
    if training.packing and training.packing_strategy == "wrapped":
        raise ValueError(
            "packing_strategy=wrapped lets the documents of a sequence attend to each other; write bfd, "
            "which keeps "
            "them apart (and long_samples: split to cut long ones)"
        )
    if options.chunk.chunk_packing:
        check_packing(options)
    dataset_kwargs = training.dataset_kwargs
    if isinstance(dataset_kwargs, dict) and dataset_kwargs.get("skip_prepare_dataset"):
        raise ValueError(
            "dataset_kwargs.skip_prepare_dataset=True skips the checks of the samples; leave it out: a "
            "dataset with "
            "input_ids and labels is taken as it is"
        )
    if data.dataset_streaming or options.mixture.streaming:
        raise ValueError(
            "dataset_streaming=True: samples that stream cannot be checked before training; write false"
        )
    if not data.dataset_name and not options.mixture.datasets:
        raise ValueError(
            "dataset_name is missing: write a file, a folder, a name on the Hub, or python-stdlib"
        )
    if data.dataset_name and options.mixture.datasets:
        raise ValueError(
            "dataset_name and datasets are both set, and one would be ignored: write one of them"
        )
    if not model.model_name_or_path:
        raise ValueError("model_name_or_path is missing: write a folder or a name on the Hub")
    if model.from_scratch and (model.use_peft or model.load_in_4bit or model.load_in_8bit):
        raise ValueError(
            "from_scratch=True with use_peft or a quantised model: the base weights would be lost; drop one"
        )
    if (model.load_in_4bit or model.load_in_8bit) and not model.use_peft:
        raise ValueError(
            "load_in_4bit=True needs use_peft: true, quantised weights are not trained themselves"
        )
    if (model.load_in_4bit or model.load_in_8bit) and importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("load_in_4bit=True needs bitsandbytes: pip install 'chunkdist[qlora]'")
    if training.max_length is not None and training.max_length < 2:
        raise ValueError(f"max_length={training.max_length} leaves no token to predict: write at least 2")
    return chunk_config


def _count_or_word(text: str) -> Any:
    return int(text) if re.fullmatch(r"[+-]?\d+", text) else text


def _split_config(argument: str) -> list[str]:
    """`--config=FILE` as two words: TRL's parser knows only these."""
    return argument.split("=", 1) if argument.startswith("--config=") else [argument]


def _check_yaml(after_config: list[str]) -> None:
    if not after_config:
        raise ValueError("--config is followed by nothing: write the name of a YAML file")
    path = Path(after_config[0])
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
        raise ValueError(f"--config {path} cannot be read: {reason}") from error
    if not isinstance(content, dict):
        raise ValueError(f"--config {path} holds no options: write 'name: value' lines")
    unnamed = [key for key in content if not isinstance(key, str)]
    if unnamed:
        raise ValueError(f"--config {path}: {unnamed[0]!r} is no option's name")
