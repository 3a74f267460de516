"""Trains a reward model on pairs of answers with TRL's RewardTrainer, chunk by chunk.

    accelerate launch launchers/reward.py --config configs/reward-quickstart.yaml [--option value ...]

Launchers, engines and exit statuses are those of launchers/train.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from chunkdist.train.launch.stopping import leave
from chunkdist.train.run import run


def main(arguments: Sequence[str] | None = None) -> int:
    """One training run; returns the exit status."""
    return run("reward", arguments)


if __name__ == "__main__":
    leave(main())
