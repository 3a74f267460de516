"""The options of `chunkdist plan`."""

from __future__ import annotations

import argparse

from chunkdist.cli.config_command import add_config_command, nothing_written
from chunkdist.memory.cards import CARDS
from chunkdist.memory.sharded import ENGINE_NAMES


def add_plan(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = add_config_command(
        commands,
        "plan",
        help="where every GiB of a run goes, the longest length, the time of a step; without a GPU",
        description="Memory and time of a step, by formula, for a card that need not be there. No weights "
        "are loaded. Exit status 1 when nothing fits.",
    )
    parser.add_argument("--card", choices=list(CARDS), default="rtx3090", help="default: rtx3090, 24 GiB")
    parser.add_argument("--memory-gib", type=float, help="override the card's memory, in GiB")
    parser.add_argument("--host-gib", type=float, default=64.0, help="host memory of a rank; default: 64")
    parser.add_argument("--length", type=int, help="tokens of a row; default: max_length")
    parser.add_argument("--engine", choices=ENGINE_NAMES, help="default: single, or what the next two say")
    parser.add_argument("--deepspeed", metavar="FILE", help="the run's DeepSpeed config")
    parser.add_argument("--accelerate", metavar="FILE", help="the run's config file of accelerate launch")
    parser.add_argument("--num-ranks", type=int, help="default: what --accelerate says, or 1")
    parser.add_argument("--offload-weights", action="store_true", help="on the host between uses")
    parser.add_argument(
        "--offload-optimizer", action="store_true", help="its states on the host, and its update there"
    )
    parser.add_argument(
        "--trainer",
        choices=("sft", "dpo", "reward", "grpo"),
        default="sft",
        help="whose config; default: sft",
    )
    parser.add_argument(
        "--sequence-parallel",
        type=int,
        help="ranks that share the tokens of a row; default: the config's sequence_parallel_size",
    )
    parser.add_argument("--simulate", action="store_true", help="run the real code under fake tensors, too")
    parser.set_defaults(run=_plan)


def _plan(arguments: argparse.Namespace, options_given: list[str]) -> int:
    from rich.console import Console

    from chunkdist.cli.plan import run_plan
    from chunkdist.cli.plan_options import PlanOptions
    from chunkdist.train.options.arguments import parse_options

    names = (
        "card",
        "memory_gib",
        "host_gib",
        "length",
        "engine",
        "num_ranks",
        "offload_weights",
        "offload_optimizer",
        "deepspeed",
        "accelerate",
        "sequence_parallel",
        "simulate",
    )
    asked = PlanOptions(**{name: getattr(arguments, name) for name in names})
    with nothing_written() as silent:
        here = ["--use_cpu", "true", "--tf32", "false"]
        given = ["--config", arguments.config, *options_given, *silent, *here]
        options = parse_options(given, arguments.trainer)
        return run_plan(options, asked, Console(highlight=False))
