"""Command-line options that benchmarks share."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn import attention as torch_attention

from chunkdist.bench.models import SIZES, Sizes
from chunkdist.memory.machine import use_expandable_segments


def count(text: str) -> int:
    """The type of options that count something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no count: write an integer >= 1")
    return int(text)


_OPTIONS: dict[str, dict[str, Any]] = {
    "model": {"choices": [*SIZES][1:], "default": "10m", "help": "default: 10m"},
    "num-layers": {"type": count, "help": "layers of the model; default: the model's own number"},
    "num-tokens": {"type": count, "help": "tokens of the sequence; default: the model's own number"},
    "chunk-size": {"type": count, "help": "tokens of a chunk; default: the model's own number"},
    "repetitions": {"type": count, "help": "rounds; default: {}, with --smoke {}"},
    "device": {"default": "cpu", "help": "cpu (fp32) or cuda (bf16)"},
    "threads": {"type": count, "help": "CPU threads; default: torch's own choice"},
    "only": {"default": "", "metavar": "WORD", "help": "only what has it in the name"},
    "flash-impl": {"metavar": "NAME", "help": "what replaces torch's flash attention: FA3, where installed"},
    "memory-gib": {"type": float, "help": "GPU memory of the run; 1 GiB of it is for context and desktop"},
}


def parser_of(
    name: str, description: str, *options: str, num_rounds: tuple[int, int] = (1, 1)
) -> argparse.ArgumentParser:
    """A parser with `--smoke`, `--json`, and those of the shared options that are named.

    Args:
        num_rounds: The default of `--repetitions`, and the one with `--smoke`.
    """
    parser = argparse.ArgumentParser(prog=f"chunkdist bench {name}", description=description)
    parser.add_argument("--smoke", action="store_true", help="tiny, in seconds: the figures mean nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the figures go")
    for option in options:
        settings = dict(_OPTIONS[option])
        settings["help"] = settings["help"].format(*num_rounds)
        parser.add_argument(f"--{option}", **settings)
    parser.set_defaults(default_rounds=num_rounds)
    return parser


def checked(parser: argparse.ArgumentParser, given: Sequence[str]) -> argparse.Namespace:
    """The options: the number of rounds is filled in, counts and the device are checked; threads, flash
    attention and the limit of memory are set."""
    options = parser.parse_args(given)
    if getattr(options, "repetitions", 0) is None:
        options.repetitions = options.default_rounds[options.smoke]
    device = getattr(options, "device", "cpu")
    if device != "cpu" and not re.fullmatch(r"cuda(:\d+)?", device):
        parser.error(f"--device {device}: write cpu, cuda, or cuda and its index, as in cuda:1")
    if device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {device}: torch sees no GPU on this machine: write --device cpu")
    file = options.json
    if file is not None and (file.is_dir() or not file.parent.is_dir()):
        parser.error(f"--json {file}: it is a folder, or its folder does not exist: write a file in one")
    if getattr(options, "threads", None) is not None:
        torch.set_num_threads(options.threads)
    if getattr(options, "flash_impl", None) is not None:
        _activate_flash(parser, options.flash_impl)
    if getattr(options, "memory_gib", None) is not None and device.startswith("cuda"):
        _limit_memory(parser, options.memory_gib)
    return options


def sizes_of(options: argparse.Namespace) -> Sizes:
    """The model and its sequence, with what the options change."""
    sizes = SIZES["smoke" if options.smoke else options.model]
    names = ("num_layers", "num_tokens", "chunk_size")
    given = {name: getattr(options, name, None) for name in names}
    return replace(sizes, **{name: value for name, value in given.items() if isinstance(value, int)})


def _limit_memory(parser: argparse.ArgumentParser, memory_gib: float) -> None:
    """Segments can grow then, as in the launcher: near the limit, gaps between fixed segments count."""
    use_expandable_segments()
    total, usable = torch.cuda.get_device_properties(0).total_memory, (memory_gib - 1) * 2**30
    if not 0 < usable <= total:
        parser.error(
            f"--memory-gib {memory_gib:g}, but the GPU has {total / 2**30:.1f} GiB: write more than 1 and no "
            "more than it has"
        )
    torch.cuda.set_per_process_memory_fraction(usable / total)


def _activate_flash(parser: argparse.ArgumentParser, name: str) -> None:
    known: list[str] = getattr(torch_attention, "list_flash_attention_impls", list)()  # not in torch 2.11
    if name not in known:
        parser.error(f"--flash-impl {name}: this torch knows {', '.join(known) or 'none'}: leave it out")
    try:
        torch_attention.activate_flash_attention_impl(name)
    except (ImportError, RuntimeError) as error:
        parser.error(f"--flash-impl {name} is not to be had here ({error}): install it, or leave this out")
