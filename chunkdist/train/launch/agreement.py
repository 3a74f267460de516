"""What one rank of each machine does, and all ranks learn: files are read and tried once, and no rank goes on
where another has refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

from torch import distributed

Result = TypeVar("Result")


def agreed(function: Callable[[], Result]) -> Result:
    """The result of `function` on the first rank of each machine, on all ranks. Collective.

    Raises:
        ValueError: it raised one on some rank, or machines, which may have a disk each, have other results.
        RuntimeError: it raised something else; the rank itself raises its own error.
    """
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return function()
    own: tuple[str, Any] | None = None
    raised: Exception | None = None
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        try:
            own = "result", function()
        except Exception as error:
            raised = error
            own = "fault" if isinstance(error, ValueError) else "failure", str(error)
    outcomes: list[tuple[str, Any] | None] = [None] * distributed.get_world_size()
    distributed.all_gather_object(outcomes, own)
    if raised is not None:
        raise raised
    told = [outcome for outcome in outcomes if outcome is not None]
    for kind, error_type in (("fault", ValueError), ("failure", RuntimeError)):
        for outcome in told:
            if outcome[0] == kind:
                raise error_type(outcome[1])
    results = [outcome[1] for outcome in told]
    if any(result != results[0] for result in results):
        raise ValueError(f"machines do not agree: {' and '.join(map(str, results[:2]))}; copy what differs")
    result: Result = results[0]
    return result


def any_rank(flag: bool) -> bool:
    """Whether some rank says yes. Collective."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return flag
    flags: list[bool] = [False] * distributed.get_world_size()
    distributed.all_gather_object(flags, flag)
    return any(flags)
