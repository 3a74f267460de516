"""One worker thread for each gloo process group: two of them corrupt the heap.

torch (2.13) gives a group two threads, which share one string: when a collective has run, its thread writes
its name there, and takes no lock (`ProcessGroupGloo::runLoop`, `pgStatus_->lastCompletedWorkName`). Names of
more than 15 letters lie on the heap, and `DTensor.full_tensor()` asks for a collective with such a name
(ALLGATHER_COALESCED). Two threads that end their collectives at the same moment free the same memory twice,
or write to it when it is free: a rank dies of `malloc(): unaligned tcache chunk detected`, or somebody else's
numbers change.

torch has no setting for the number of threads: `init_process_group` hands on no options to gloo. pytorch pull
request 190738 takes the string out of `ProcessGroupGloo`; from the release that has it, this can go.
"""

from __future__ import annotations

import os
from contextlib import suppress
from datetime import timedelta
from functools import cache
from typing import Any

from torch.distributed import distributed_c10d


@cache
def use_one_gloo_thread() -> None:
    """From now on, in this process, for groups that Accelerate, DeepSpeed and device meshes make, too.

    Collectives of one group then run one after another, in the order in which they were asked for.
    """
    if not distributed_c10d.is_gloo_available():
        return
    gloo: Any = distributed_c10d.ProcessGroupGloo
    init = gloo.__init__

    def init_with_one_thread(
        group: Any, store: distributed_c10d.Store, rank: int, size: int, timeout: timedelta
    ) -> None:
        options = gloo._Options()
        options._devices, options._threads, options._timeout = _devices(gloo), 1, timeout
        init(group, store, rank, size, options)

    gloo.__init__ = init_with_one_thread


def wake_without_preempting() -> None:
    """For ranks without an accelerator, on Linux: a thread that is woken lets the one that woke it go on.

    gloo's worker holds a lock while it sends, which wakes its own I/O thread and the peer's. Where these take
    its core, they find the lock taken and ask for it until their time is up. A collective of 64 numbers took
    4.2 ms so, on two busy cores, and 0.16 ms with this; two worker threads took 0.4 ms.
    """
    with suppress(AttributeError, OSError):  # another system, or a container that forbids it
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def _devices(gloo: Any) -> list[Any]:
    """Those that torch takes itself."""
    names = os.environ.get("GLOO_SOCKET_IFNAME", "")
    if not names:
        return [gloo.create_default_device()]
    return [gloo.create_device(interface=name) for name in names.split(",")]
