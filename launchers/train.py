"""Trains a causal language model on long sequences with TRL's SFTTrainer, chunk by chunk.

    accelerate launch launchers/train.py --config configs/quickstart.yaml [--option value ...]

Runs under `python`, `accelerate launch`, `deepspeed` and `torchrun` alike. Exit status 2: the input is at
fault, and one line says how; 1: the gradient check or another rank failed, or the weights are saved and
something beside them is not; 1 with a traceback: the fault is our own; 3: nothing was trained, or the weights
or losses are no numbers; 75: a signal has stopped it, and a checkpoint is saved.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

try:
    from chunkdist.train.launch.stopping import leave
    from chunkdist.train.run import run
except KeyboardInterrupt:  # these imports take seconds
    print("chunkdist: stopped by SIGINT: before the first step, nothing was saved", file=sys.stderr)
    raise SystemExit(130) from None


def main(arguments: Sequence[str] | None = None) -> int:
    """One training run; returns the exit status."""
    return run("sft", arguments)


if __name__ == "__main__":
    leave(main())
