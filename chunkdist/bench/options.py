"""Command-line options that benchmarks share."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import torch
from torch.nn import attention as torch_attention

from chunkdist.bench.sizes import SIZES
from chunkdist.bench.timing import limit_gpu_memory
from chunkdist.memory.machine import use_expandable_segments

_OPTIONS: dict[str, dict[str, Any]] = {
    "model": {
        "choices": [name for name in SIZES if name != "smoke"],
        "default": "10m",
        "help": "default: 10m",
    },
    "repetitions": {"type": int, "help": "rounds; default: {}, with --smoke {}"},
    "device": {"default": "cpu", "help": "cpu (fp32) or cuda (bf16)"},
    "threads": {"type": int, "help": "CPU threads; default: torch's own choice"},
    "flash-impl": {
        "metavar": "NAME",
        "help": "what torch's flash attention is replaced by, for all ways: FA3, where it is installed",
    },
    "num-layers": {"type": int, "help": "of the model, alike; default: the model's own"},
    "memory-gib": {
        "type": float,
        "help": "GPU memory that the run may take, less 1 GiB for the context and the desktop",
    },
}


def parser_of(
    name: str,
    description: str,
    *options: str,
    num_rounds: tuple[int, int] = (1, 1),
    has_result: bool = True,
) -> argparse.ArgumentParser:
    """A parser with those of the shared options that are named.

    Args:
        num_rounds: Default of `--repetitions`, and with `--smoke`.
        has_result: With `--smoke` and `--json`.
    """
    parser = argparse.ArgumentParser(prog=f"chunkdist bench {name}", description=description)
    if has_result:
        parser.add_argument("--smoke", action="store_true", help="tiny, in seconds: the figures mean nothing")
        parser.add_argument("--json", type=Path, metavar="FILE", help="where the figures go")
    for option in options:
        settings = dict(_OPTIONS[option])
        settings["help"] = settings["help"].format(*num_rounds)
        parser.add_argument(f"--{option}", **settings)
    parser.set_defaults(default_rounds=num_rounds)
    return parser


def parsed(parser: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
    """The options, with the number of rounds filled in and counts checked; sets the number of threads."""
    options = parser.parse_args(arguments)
    if getattr(options, "repetitions", 0) is None:
        options.repetitions = options.default_rounds[options.smoke]
    check_counts(parser, options, "repetitions", "threads", "num_tokens", "chunk_size", "num_layers")
    check_device(parser, getattr(options, "device", "cpu"))
    if (file := getattr(options, "json", None)) is not None and (file.is_dir() or not file.parent.is_dir()):
        parser.error(f"--json {file}: it is a folder, or its folder does not exist: write a file in one")
    if getattr(options, "threads", None) is not None:
        torch.set_num_threads(options.threads)
    if getattr(options, "flash_impl", None) is not None:
        activate_flash(parser, options.flash_impl)
    return options


def check_device(parser: argparse.ArgumentParser, device: str) -> None:
    """Ends the program where this machine has none of the kind."""
    if device != "cpu" and not re.fullmatch(r"cuda(:\d+)?", device):
        parser.error(f"--device {device}: write cpu, cuda, or cuda and its index, as in cuda:1")
    if device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {device}: torch sees no GPU on this machine: write --device cpu")


def limit_memory(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """What `--memory-gib` says; ends the program where there is no such memory. Before the first allocation.

    Segments can grow then, as in the launcher: near the limit, gaps between segments of fixed size count.
    """
    if options.memory_gib is None:
        return
    if not options.device.startswith("cuda"):
        parser.error(
            f"--memory-gib {options.memory_gib:g} limits a GPU's memory, and --device {options.device} is "
            "none: leave it out, or write --device cuda"
        )
    use_expandable_segments()
    try:
        limit_gpu_memory(options.memory_gib)
    except ValueError as error:
        parser.error(str(error))


def activate_flash(parser: argparse.ArgumentParser, name: str) -> None:
    """Puts another implementation in the place of torch's flash attention; ends the program where there is
    none of that name."""
    activate = getattr(torch_attention, "activate_flash_attention_impl", None)  # newer than torch 2.11, maybe
    known = [] if activate is None else torch_attention.list_flash_attention_impls()
    if activate is None or name not in known:
        parser.error(f"--flash-impl {name}: this torch knows {', '.join(known) or 'none'}: leave it out")
    try:
        activate(name)
    except (ImportError, RuntimeError) as error:
        parser.error(f"--flash-impl {name} is not to be had here ({error}): install it, or leave this out")


def check_counts(parser: argparse.ArgumentParser, options: argparse.Namespace, *names: str) -> None:
    """Ends the program where one of these options, or a number of its list, is not at least 1."""
    for name in names:
        given = getattr(options, name, None)
        for count in given if isinstance(given, list) else [given]:
            if isinstance(count, int) and count < 1:
                parser.error(f"--{name.replace('_', '-')} {count} is no count: write an integer >= 1")


def dtype_on(device: str) -> torch.dtype:
    """What models are timed in."""
    return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
