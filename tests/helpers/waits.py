"""Counts what would make the host wait for a GPU: operations whose result, or its shape, it must know."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_ATEN = torch.ops.aten
_WAITING = (_ATEN._local_scalar_dense, _ATEN.nonzero, _ATEN.masked_select, _ATEN.equal, _ATEN._unique2)
_BY_MASK = (_ATEN.index, _ATEN.index_put, _ATEN.index_put_)


class Waits(TorchDispatchMode):
    """Attributes:
    names: The operations, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        is_masked = packet in _BY_MASK and any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if packet in _WAITING or is_masked:
            self.names.append(str(packet))
        return func(*args, **(kwargs or {}))
