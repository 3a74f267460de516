"""Counts what a rank asks of its process group: collectives, and their bytes.

Every engine's collectives pass torch's dispatcher as `c10d` operators, DDP's from C++ too: one place to look,
with no engine's internals in it. (`CommDebugMode` looks there, too, and breaks on the models' own hooks.)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode

GATHER, REDUCE_SCATTER, ALL_REDUCE, BROADCAST = "all-gather", "reduce-scatter", "all-reduce", "broadcast"

_KINDS = {
    "allgather_": GATHER,
    "_allgather_base_": GATHER,
    "allgather_coalesced_": GATHER,
    "allgather_into_tensor_coalesced_": GATHER,
    "reduce_scatter_": REDUCE_SCATTER,
    "_reduce_scatter_base_": REDUCE_SCATTER,
    "reduce_scatter_tensor_coalesced_": REDUCE_SCATTER,
    "allreduce_": ALL_REDUCE,
    "allreduce_coalesced_": ALL_REDUCE,
    "broadcast_": BROADCAST,
}
"""Others are counted under their operators' names."""

_WHOLE_ARGUMENT = {REDUCE_SCATTER: 1}
"""Where the whole tensor is, not a rank's part; elsewhere the first argument."""


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Traffic of one kind of collective.

    Args:
        count: How many.
        whole_bytes: Bytes of the whole tensors: what is gathered, or reduced.
        sent_bytes: What a rank sends in a ring of n ranks: (n - 1) / n of a gather or a reduce-scatter, twice
            that of an all-reduce, all of others.
    """

    count: int = 0
    whole_bytes: int = 0
    sent_bytes: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            count=self.count + other.count,
            whole_bytes=self.whole_bytes + other.whole_bytes,
            sent_bytes=self.sent_bytes + other.sent_bytes,
        )


class CollectiveCounter(TorchDispatchMode):
    """Inside, the collectives of this process are counted, those of a backward too.

    `by_kind` has what was seen, by kind.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.by_kind: dict[str, Traffic] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "c10d":
            name = func.overloadpacket.__name__
            kind = _KINDS.get(name, name)
            self.by_kind[kind] = self.by_kind.get(kind, Traffic()) + _traffic(kind, args)
        return func(*args, **kwargs or {})


def _traffic(kind: str, args: tuple[Any, ...]) -> Traffic:
    whole = sum(x.nbytes for x in _tensors(args[_WHOLE_ARGUMENT.get(kind, 0)])) if args else 0
    rounds = {GATHER: 1, REDUCE_SCATTER: 1, ALL_REDUCE: 2}.get(kind)
    if rounds is None:
        return Traffic(count=1, whole_bytes=whole, sent_bytes=whole)
    num_ranks = next(ProcessGroup.unbox(x).size() for x in args if isinstance(x, torch.ScriptObject))
    return Traffic(count=1, whole_bytes=whole, sent_bytes=rounds * whole * (num_ranks - 1) // num_ranks)


def _tensors(argument: Any) -> Iterator[Tensor]:
    if isinstance(argument, Tensor):
        yield argument
    elif isinstance(argument, (list, tuple)):
        for item in argument:
            yield from _tensors(item)
