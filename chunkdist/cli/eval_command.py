"""`chunkdist eval`: loss by position and recall of the model that a run has saved."""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chunkdist.cli.config_command import add_config_command, nothing_written

if TYPE_CHECKING:
    from chunkdist.evaluate.measure import EvalSettings
    from chunkdist.train.options.arguments import TrainingOptions

NUM_LENGTHS, SHORTEST = 4, 128
_ADAPTER_NAME = "evaluated"


def add_eval(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = add_config_command(
        commands,
        "eval",
        help="loss by position, and recall of needles by depth and length, of the model that a run has saved",
        description="Loss by position and recall (one needle, several, many keys) at several lengths, in "
        "chunks. Texts are those of the config's data, of its test split where it has one. Writes eval.json "
        "and eval.png into output_dir.",
        config="the YAML file of an SFT run",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--adapter", type=Path, metavar="DIR", help="adapters to evaluate; default: the model in output_dir"
    )
    which.add_argument(
        "--base", action="store_true", help="evaluate the config's model as it is before training"
    )
    parser.add_argument(
        "--lengths",
        type=int,
        nargs="+",
        metavar="TOKENS",
        help="of a sequence; default: context_length or max_length, and its half, quarter and eighth",
    )
    parser.add_argument("--depths", type=int, default=5, help="depths of needles; default: 5")
    parser.add_argument("--trials", type=int, default=2, help="answers a task, length and depth; default: 2")
    parser.add_argument("--rows", type=int, default=2, help="sequences whose loss is taken; default: 2")
    parser.add_argument("--into", type=Path, metavar="DIR", help="where files go; default: output_dir")
    parser.set_defaults(run=_eval)


@dataclass(frozen=True, kw_only=True)
class _Source:
    """Which model is evaluated.

    Args:
        options: Put behind the config's.
        adapter: A folder of adapters for it.
    """

    name: str
    options: tuple[str, ...] = ()
    adapter: Path | None = None


def _eval(arguments: argparse.Namespace, options_given: list[str]) -> int:
    from rich.console import Console

    from chunkdist.bench.report import hardware, versions
    from chunkdist.chunking import chunk_model
    from chunkdist.evaluate.documents import read_documents
    from chunkdist.evaluate.measure import evaluate
    from chunkdist.evaluate.report import as_json, picture, tables
    from chunkdist.files import save_figure, whole_file
    from chunkdist.train.build import build_trainer, held_out_split
    from chunkdist.train.options.arguments import parse_options

    output_dir = _output_dir(Path(arguments.config), options_given)
    source, into = _source(arguments, output_dir), arguments.into or output_dir
    if into is None:
        raise ValueError(f"{arguments.config} has no output_dir: write --into DIR")
    _refuse_unwritable(into)
    started = time.monotonic()
    console = Console(highlight=False, width=None if os.isatty(1) else 110)
    with nothing_written() as silent:
        given = ["--config", arguments.config, *options_given, *source.options, *silent]
        given += ["--eval_strategy", "no"]
        options = parse_options(given)
        settings = _settings(arguments, options)
        split = held_out_split(options)
        options.data.dataset_train_split = split
        trainer, config = build_trainer(_whole_documents(options))
    model: Any = trainer.model
    if source.adapter is not None:
        model = _with_adapter(model, source.adapter)
    if config is not None:
        model = chunk_model(model, replace(config.without_auto(), sampler=None, retained_chunks=0))
    samples = trainer.train_dataset
    max_tokens = 16 * settings.lengths[-1] * settings.num_rows
    documents = read_documents(samples.once() if hasattr(samples, "once") else samples, max_tokens=max_tokens)
    num_tokens = sum(len(ids) for ids, _ in documents)
    dataset = options.data.dataset_name or "datasets"
    console.print(
        f"{source.name}, on {len(documents):,} samples of split {split!r} of {dataset}, {num_tokens:,} tokens"
    )
    tokenizer: Any = trainer.processing_class

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    whole: list[int] = tokenizer("a")["input_ids"]
    start = whole[:1] if whole[:1] == [tokenizer.bos_token_id] else []
    with trainer.accelerator.autocast(), console.status("") as status:
        found = evaluate(model, documents, encode, settings, start=start, progress=status.update)
    result = {
        "model": source.name,
        "data": {"name": dataset, "split": split, "num_samples": len(documents), "num_tokens": num_tokens},
        "chunk_size": None if config is None else config.without_auto().chunk_size,
        "seconds": round(time.monotonic() - started, 1),
        "hardware": hardware(str(trainer.args.device)),
        "versions": versions(),
        **as_json(found),
    }
    if found.num_joined:
        console.print(f"{found.num_joined} of {found.num_rows} sequences are of more than one sample")
    for table in tables(found):
        console.print(table)
    into.mkdir(parents=True, exist_ok=True)
    save_figure(picture(found), into / "eval.png")
    with whole_file(into / "eval.json") as unfinished:
        unfinished.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    console.print(f"{into / 'eval.json'} and eval.png")
    return 0


def _output_dir(config: Path, options_given: list[str]) -> Path | None:
    from chunkdist.train.options.yaml_options import read_yaml

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--output_dir", "--output-dir", default=read_yaml(config).get("output_dir"))
    folder = parser.parse_known_args(options_given)[0].output_dir
    return None if folder is None else Path(folder)


def _source(arguments: argparse.Namespace, output_dir: Path | None) -> _Source:
    """The adapters that were named, or what the run has saved."""
    if arguments.base:
        return _Source(name="the model before training")
    if arguments.adapter is not None:
        if not (arguments.adapter / "adapter_config.json").is_file():
            raise ValueError(
                f"--adapter {arguments.adapter} has no adapter_config.json: write a folder of PEFT"
            )
        return _Source(name=str(arguments.adapter), adapter=arguments.adapter)
    if output_dir is not None and (output_dir / "adapter_config.json").is_file():
        return _Source(name=str(output_dir), adapter=output_dir)
    if output_dir is not None and (output_dir / "config.json").is_file():
        of_run = ("--model_name_or_path", str(output_dir), "--from_scratch", "false")
        return _Source(name=str(output_dir), options=of_run)
    raise ValueError(
        f"{arguments.config}: its output_dir ({output_dir}) holds no model: train first, or write --adapter "
        "DIR, or --base for the model before training"
    )


def _refuse_unwritable(folder: Path) -> None:
    """Before the work, not after it."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ValueError(f"{folder} cannot be written to: write --into DIR")


def _settings(arguments: argparse.Namespace, options: TrainingOptions) -> EvalSettings:
    from chunkdist.evaluate.measure import EvalSettings

    for name, least in (("depths", 1), ("trials", 1), ("rows", 1)):
        if getattr(arguments, name) < least:
            raise ValueError(f"--{name} {getattr(arguments, name)} asks nothing: write at least {least}")
    lengths = arguments.lengths
    if lengths is None:
        longest = options.model.context_length or options.training.max_length
        if longest is None:
            raise ValueError("the config has no context_length or max_length to evaluate at: write --lengths")
        lengths = [longest >> halvings for halvings in range(NUM_LENGTHS)]
        lengths = [length for length in lengths if length >= SHORTEST] or [longest]
    if min(lengths) < 2:
        raise ValueError(f"--lengths {min(lengths)} leaves nothing to predict: write at least 2")
    last = max(1, arguments.depths - 1)
    return EvalSettings(
        lengths=tuple(sorted(set(lengths))),
        depths=tuple(number / last for number in range(arguments.depths)),
        num_rows=arguments.rows,
        num_trials=arguments.trials,
        seed=options.training.seed,
    )


def _whole_documents(options: TrainingOptions) -> TrainingOptions:
    """The same run, whose samples are neither cut nor joined."""
    training = options.training
    training.max_length = training.eval_packing = None
    training.packing = training.padding_free = False
    return replace(options, chunk=replace(options.chunk, chunk_packing=False, oom="error"))


def _with_adapter(model: Any, folder: Path) -> Any:
    """The model with the adapters of a folder, and no others.

    Raises:
        ValueError: they do not belong to it.
    """
    from peft import PeftConfig, PeftModel, get_peft_model

    from chunkdist.train.launch.faults import asked_by

    with asked_by(f"--adapter {folder}"):
        if not isinstance(model, PeftModel):
            model = get_peft_model(model, PeftConfig.from_pretrained(str(folder)))
        result = model.load_adapter(str(folder), _ADAPTER_NAME)
    if result.missing_keys or result.unexpected_keys:
        key, what = next(
            (keys[0], what)
            for keys, what in ((result.missing_keys, "lacks"), (result.unexpected_keys, "holds"))
            if keys
        )
        raise ValueError(
            f"--adapter {folder} {what} {key}, unlike adapters of the config's model: write those of it"
        )
    model.set_adapter(_ADAPTER_NAME)
    return model
