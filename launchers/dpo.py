"""Trains a language model on pairs of answers with TRL's DPOTrainer, chunk by chunk.

    accelerate launch launchers/dpo.py --config configs/dpo-quickstart.yaml [--option value ...]

Launchers, engines and exit statuses are those of launchers/train.py.
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
    return run("dpo", arguments)


if __name__ == "__main__":
    leave(main())
