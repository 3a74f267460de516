"""What the commands that take a run's config have in common."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager


def add_config_command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    *,
    help: str,
    description: str,
    config: str = "the YAML file of a training run",
) -> argparse.ArgumentParser:
    """The parser of `chunkdist NAME CONFIG`; options of the config can follow."""
    parser = commands.add_parser(
        name,
        help=help,
        description=description,
        epilog=f"Any option of the config can follow: chunkdist {name} CONFIG --chunk_size 1024",
        allow_abbrev=False,
    )
    parser.add_argument("config", metavar="CONFIG", help=config)
    return parser


@contextmanager
def nothing_written() -> Iterator[list[str]]:
    """Options of a run that leaves nothing behind. Its `output_dir`, which arguments and trainers make, is
    there inside; it is empty, so nothing is resumed."""
    with tempfile.TemporaryDirectory() as folder:
        yield [
            *("--output_dir", folder, "--report_to", "none", "--push_to_hub", "false"),
            *("--resume_from_checkpoint", "false"),
        ]
