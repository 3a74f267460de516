"""The `chunkdist` command: `chunkdist plan CONFIG`, `check CONFIG`, `preview CONFIG`, `eval CONFIG`,
`bench NAME`, `doctor`, `env`.

Exit status 0: fine; 1: the answer is no (gradients differ, nothing fits, a kernel is wrong); 2: the input is
at fault, one line on stderr says how.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chunkdist.bench import BENCHMARKS
from chunkdist.bench import run as run_benchmark
from chunkdist.cli.config_command import add_config_command, nothing_written
from chunkdist.cli.eval_command import add_eval
from chunkdist.cli.plan_command import add_plan

if TYPE_CHECKING:
    from chunkdist.config import ChunkConfig
    from chunkdist.train.trainers.checked import CheckedSFTTrainer

Command = Callable[[argparse.Namespace, list[str]], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand and returns the exit status."""
    parser = argparse.ArgumentParser(prog="chunkdist", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    add_plan(commands)
    _add_check(commands)
    _add_preview(commands)
    add_eval(commands)
    _add_bench(commands)
    _add_doctor(commands)
    _add_env(commands)
    try:
        arguments, others = parser.parse_known_args(argv)
    except SystemExit as stop:  # argparse has said what is wrong, or --help
        return int(stop.code or 0)
    command: Command = arguments.run
    try:
        return command(arguments, others)
    except (ValueError, NotImplementedError, OSError) as error:
        print(f"chunkdist: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return 2


def _add_check(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = add_config_command(
        commands,
        "check",
        help="compare the gradients of a short sample, chunked against unchunked",
        description="One step on a short sample of the config's data with its model, chunked and not: how "
        "far the gradients are apart, beside the model's own rounding error. Exit status 1 when chunks are "
        "worse.",
    )
    parser.set_defaults(run=_check)


def _add_preview(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = add_config_command(
        commands,
        "preview",
        help="show the first streams that a config trains on, with supervised tokens in colour",
        description="The first streams of a run: their sequences, where chunks begin, and in bright colour "
        "the tokens that are supervised. Nothing is written.",
    )
    parser.add_argument("--streams", type=int, default=2, help="how many streams; default: 2")
    parser.add_argument(
        "--num-ranks", type=int, default=1, help="of the job whose streams are shown; default: 1"
    )
    parser.add_argument("--tokens", type=int, default=200, help="tokens of a sequence shown; default: 200")
    parser.set_defaults(run=_preview)


def _add_bench(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    width = max(map(len, BENCHMARKS))
    parser = commands.add_parser(
        "bench",
        help="run one of the benchmarks that the docs quote",
        description="Benchmarks:\n" + "\n".join(f"  {name:{width}}  {x}" for name, x in BENCHMARKS.items()),
        epilog="Options of one benchmark: chunkdist bench NAME --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("name", metavar="NAME", choices=list(BENCHMARKS))
    parser.add_argument("options", metavar="...", nargs=argparse.REMAINDER, help="options of the benchmark")
    parser.set_defaults(run=_bench)


def _add_doctor(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "doctor",
        help="whether this machine can train: driver, kernels against the truth, pinned memory, speed",
        description="Small checks of this machine, in under two minutes. Exit status 1 when something is "
        "wrong, with one line each for what to do.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--json",
        type=Path,
        default=Path("chunkdist-doctor.json"),
        metavar="FILE",
        help="where the findings are written; default: chunkdist-doctor.json",
    )
    parser.set_defaults(run=_doctor)


def _add_env(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("env", help="versions, devices, and the attention backends that run on them")
    parser.set_defaults(run=_env)


def _preview(arguments: argparse.Namespace, options_given: list[str]) -> int:
    from rich.console import Console

    from chunkdist.chunking import shared_prefixes
    from chunkdist.cli.preview import first_streams, forest, render

    for name in ("streams", "tokens", "num_ranks"):
        if (value := getattr(arguments, name)) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value} shows nothing: write at least 1")
    trainer, config = _trainer(
        arguments.config, [*options_given, "--use_cpu", "true", "--tf32", "false"], has_weights=False
    )
    if config is None:
        raise ValueError("chunk_method=none has no chunks to show: write seco")
    console = Console(highlight=False)
    tokenizer: Any = trainer.processing_class
    assert trainer.model is not None
    rule = shared_prefixes(trainer.model, config)
    sizes = {"chunk_size": int(config.without_auto().chunk_size), "max_segment_tokens": arguments.tokens}
    for title, samples in first_streams(trainer, arguments.streams, num_ranks=arguments.num_ranks):
        for line in (*render(title, samples, tokenizer, **sizes), *forest(samples, rule)):
            console.print(line)
    return 0


def _trainer(
    config: str, options_given: list[str], *, has_weights: bool = True
) -> tuple[CheckedSFTTrainer, ChunkConfig | None]:
    from chunkdist.train.build import build_trainer
    from chunkdist.train.options.arguments import parse_options

    with nothing_written() as silent:
        options = parse_options(["--config", config, *options_given, *silent])
        return build_trainer(options, has_weights=has_weights)


def _check(arguments: argparse.Namespace, options_given: list[str]) -> int:
    from chunkdist.check.gradients import check_gradients
    from chunkdist.train.build import first_batch

    trainer, config = _trainer(arguments.config, options_given)
    if config is None:
        raise ValueError("chunk_method=none chunks nothing, so there is nothing to check: write seco")
    assert trainer.model is not None
    with trainer.accelerator.autocast():
        result = check_gradients(trainer.model, first_batch(trainer), config)
    print(result.report())
    return 0 if result.passed else 1


def _bench(arguments: argparse.Namespace, others: list[str]) -> int:
    try:
        return run_benchmark(arguments.name, [*others, *arguments.options])
    except SystemExit as stop:  # its own options: argparse has said what is wrong, or --help
        return int(stop.code or 0)


def _doctor(arguments: argparse.Namespace, others: list[str]) -> int:
    if others:
        raise ValueError(f"chunkdist doctor takes no {others[0]!r}: leave it out")
    from rich.console import Console

    from chunkdist.cli.doctor import run_doctor

    return run_doctor(arguments.json, Console(highlight=False))


def _env(arguments: argparse.Namespace, others: list[str]) -> int:
    if others:
        raise ValueError(f"chunkdist env takes no arguments, but {others[0]!r} was given: leave it out")
    from chunkdist.cli.environment import environment_rows

    rows = environment_rows()
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
