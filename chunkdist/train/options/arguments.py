"""The options of a training run, TRL's own and ours, by one name in YAML and on the command line."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_type_hints

from trl import (
    DatasetMixtureConfig,
    DPOConfig,
    GRPOConfig,
    ModelConfig,
    RewardConfig,
    ScriptArguments,
    SFTConfig,
    TrlParser,
)

from chunkdist.data.samples import LongSamples
from chunkdist.models.context_length import Recipe
from chunkdist.train.launch.faults import asked_by
from chunkdist.train.launch.roll_call import check_launch, forget_stale_rank
from chunkdist.train.options.chunk_options import ChunkArguments, option
from chunkdist.train.options.deepspeed_options import check_deepspeed
from chunkdist.train.options.names import OLD_NAMES
from chunkdist.train.options.rules import bool_or_word, check_values, is_bool_or_word
from chunkdist.train.options.run_arguments import RunArguments
from chunkdist.train.options.trainer_rules import check_trainer_values
from chunkdist.train.options.yaml_options import read_yaml

TrainerKind = Literal["sft", "dpo", "reward", "grpo"]


@dataclass
class DataArguments(ScriptArguments):
    """TRL's dataset options, and what becomes of samples that do not fit."""

    long_samples: str = option(
        "error",
        "What becomes of a sample longer than max_length: error (before training), truncate, split (plain "
        "text only), or drop. What was done is said.",
        choices=get_args(LongSamples),
    )
    corpus_max_bytes: int = option(
        4_000_000, "How much of the interpreter's standard library dataset_name: python-stdlib reads."
    )


@dataclass
class RewardedArguments(ScriptArguments):
    """TRL's dataset options, and what rewards a completion."""

    reward_funcs: list[str] | None = option(  # noqa: RUF009
        None,
        "What rewards a completion: functions of TRL (think_format_reward, ...) or of yours, as FILE.py:NAME "
        "or package.module:NAME, and folders of reward models.",
    )
    corpus_max_bytes: int = option(
        4_000_000, "How much of the interpreter's standard library dataset_name: python-stdlib reads."
    )


@dataclass
class TrainArguments(RunArguments, SFTConfig):  # type: ignore[misc]
    """TRL's `SFTConfig`."""

    kind = "sft"

    pipeline_stages: int = option(
        1,
        "Ranks that share a model, each some of its layers; other ranks are replicas (docs/pipeline.md).",
    )
    pipeline_shard_weights: bool = option(
        False, "Replicas of a pipeline's stage share its weights and optimizer states (FSDP2)."
    )
    pipeline_forwards_ahead: str = option(
        "1", "Forwards that a stage is ahead of the next one; 2: a smaller bubble, more graphs. auto: chosen."
    )

    sequence_parallel_size: int = option(
        1,
        "Ranks that share the tokens of each row; the rest of the ranks is data-parallel (docs/sharding.md).",
    )


class _PlainRows:
    """What only `SFTTrainer` has: other trainers' samples are a row or two each, on whole models."""

    pipeline_stages, pipeline_shard_weights, pipeline_forwards_ahead = 1, False, "1"
    sequence_parallel_size = 1
    packing = eval_packing = padding_free = activation_offloading = False
    packing_strategy, dataset_kwargs, max_length = "bfd", None, None


@dataclass
class DPOArguments(RunArguments, _PlainRows, DPOConfig):  # type: ignore[misc]
    """TRL's `DPOConfig`."""

    kind = "dpo"


@dataclass
class RewardArguments(RunArguments, _PlainRows, RewardConfig):  # type: ignore[misc]
    """TRL's `RewardConfig`."""

    kind = "reward"


@dataclass
class GRPOArguments(RunArguments, _PlainRows, GRPOConfig):  # type: ignore[misc]
    """TRL's `GRPOConfig`."""

    kind = "grpo"


KINDS: dict[TrainerKind, tuple[type, type]] = {
    "sft": (DataArguments, TrainArguments),
    "dpo": (DataArguments, DPOArguments),
    "reward": (DataArguments, RewardArguments),
    "grpo": (RewardedArguments, GRPOArguments),
}
"""What is asked about data, and about training."""


@dataclass
class ModelArguments(ModelConfig):
    """TRL's model options."""

    from_scratch: bool = option(
        False,
        "Draw the weights from the model's config instead of loading them; model_name_or_path then is a "
        "folder (or a name on the Hub) with config.json and a tokenizer.",
    )
    context_length: int | None = option(
        None,
        "Tokens of the longest sequence that the model is set up for, where it was made for fewer: rotary "
        "frequencies are scaled, and the saved config says so (docs/usage.md).",
    )
    rope_extension: str = option(
        "auto",
        "How context_length scales rotary frequencies. auto: as the model's family does, or as the model is "
        "scaled already. none: not at all, and only the config names the length.",
        choices=get_args(Recipe),
    )
    allow_missing_weights: bool = option(
        False,
        "Train from a model whose files and config.json differ: weights that the files lack are drawn at "
        "random, others are left out. What they are is said.",
    )


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Everything that one run was told."""

    chunk: ChunkArguments
    data: Any
    """One of `KINDS`."""
    training: Any
    """Likewise."""
    model: ModelArguments
    mixture: DatasetMixtureConfig

    @property
    def kind(self) -> TrainerKind:
        kind: TrainerKind = self.training.kind
        return kind

    @property
    def is_streaming(self) -> bool:
        """Whether the option that belongs to the kind of dataset is set."""
        return bool(self.data.dataset_streaming if self.data.dataset_name else self.mixture.streaming)


class OptionParser(TrlParser):
    """TRL's parser; faults of YAML and command line alike are one line that names the option."""

    def __init__(self, kind: TrainerKind = "sft") -> None:
        types = (ChunkArguments, *KINDS[kind], ModelArguments, DatasetMixtureConfig)
        super().__init__(types, allow_abbrev=False)  # type: ignore[arg-type]  # TRL's annotation is a string
        self._from_yaml: set[str] = set()
        self._kind = kind
        hints = {name: hint for kind in types for name, hint in get_type_hints(kind).items()}
        for action in self._actions:
            # argparse has one type an option: where that is bool, all words are refused.
            if action.dest == "fsdp" or is_bool_or_word(hints.get(action.dest)):
                action.type = bool_or_word

    def parse(self, arguments: Sequence[str] | None = None) -> TrainingOptions:
        """The options of a command line, `--config FILE.yaml` among them.

        Raises:
            ValueError: an unknown or unfit option, or an unreadable YAML file.
        """
        given = [part for argument in (arguments or []) for part in _split_config(argument)]
        if "--config" in given:
            _check_yaml(given[given.index("--config") + 1 : given.index("--config") + 2])
        with asked_by():  # what only a dataclass notices
            *parsed, from_yaml, from_command_line = self.parse_args_and_config(
                given, return_remaining_strings=True, separate_remaining_strings=True
            )
        if "--config" in from_command_line:
            self.error("--config is given twice: write it once (`make train CONFIG=FILE`)")
        for unknown in [*from_yaml[::2], *(part for part in from_command_line if part.startswith("-"))]:
            self.error(f"unknown option {unknown.split('=')[0].lstrip('-')!r}{self._nearest(unknown)}")
        if from_command_line:
            self.error(f"{from_command_line[0]!r} belongs to no option: write --option value")
        chunk, data, training, model, mixture = parsed
        return TrainingOptions(chunk=chunk, data=data, training=training, model=model, mixture=mixture)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, but values are checked before dataclasses are made of them."""
        values, unknown = super().parse_known_args(args, namespace)
        words = [argument.split("=")[0] for argument in args or [] if argument.startswith("--")]
        options = self._option_string_actions
        given = self._from_yaml | {options[word].dest for word in words if word in options}
        check_values(values, given, self.dataclass_types)
        check_trainer_values(values, given, self._kind)
        check_deepspeed(values)
        return values, unknown

    def set_defaults_with_config(self, **values: Any) -> list[str]:
        """Sets defaults as TRL does, after values of a YAML file have passed the checks of the command
        line."""
        self._from_yaml = set(values)
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
        if value is False and "no" in (action.choices or ()):
            return "no"  # YAML reads an unquoted no as false
        values = value if isinstance(value, list) else [value]
        values = [str(element).lower() if isinstance(element, bool) else element for element in values]
        if any(element is None or isinstance(element, (list, dict)) for element in values):
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
        if name in OLD_NAMES:
            return f": {OLD_NAMES[name]}"
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        return f": did you mean {close[0]!r}?" if close else ": --help lists those that there are"


def parse_options(arguments: Sequence[str] | None = None, kind: TrainerKind = "sft") -> TrainingOptions:
    """The options of this process's command line, or of `arguments`."""
    check_launch()
    forget_stale_rank()
    return OptionParser(kind).parse(sys.argv[1:] if arguments is None else arguments)


def _split_config(argument: str) -> list[str]:
    """`--config=FILE` as two words: TRL's parser knows only these."""
    return argument.split("=", 1) if argument.startswith("--config=") else [argument]


def _check_yaml(after_config: list[str]) -> None:
    if not after_config:
        raise ValueError("--config is followed by nothing: write the name of a YAML file")
    read_yaml(Path(after_config[0]))
