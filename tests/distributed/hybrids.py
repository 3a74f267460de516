"""All hybrid classes under all engines, on two gloo ranks; the tests run a part of it.

python -m tests.distributed.hybrids             # all classes
python -m tests.distributed.hybrids NAME...     # some
"""

from __future__ import annotations

import sys

from tests.distributed.cases import Case, errors_of
from tests.distributed.ranks import Ranks
from tests.helpers.hybrids import LAYER_TYPES


def cases(name: str) -> list[Case]:
    return [
        Case(engine="ddp", hybrid=name),
        Case(engine="ddp", hybrid=name, layers_per_group=2, retained_chunks=1),
        Case(engine="ddp", hybrid=name, layers_per_group="all"),
        Case(engine="fsdp2", hybrid=name),
        Case(engine="fsdp2 groups", hybrid=name, layers_per_group=2),
        Case(engine="fsdp2 groups", hybrid=name, layers_per_group="all", retained_chunks=1),
        Case(engine="zero3", hybrid=name),
        Case(engine="zero3", hybrid=name, retained_chunks=1),
    ]


def main() -> None:
    ranks = Ranks(2)
    for name in sys.argv[1:] or LAYER_TYPES:
        found = {case: ranks.run(errors_of, case) for case in cases(name)}
        errors = {case: max(error.gradients for error in of_ranks) for case, of_ranks in found.items()}
        worst = max(errors, key=lambda case: errors[case])
        print(f"{name}: {len(errors)} cases, largest error {errors[worst]:.1e} ({worst})", flush=True)
    ranks.stop()


if __name__ == "__main__":
    main()
