"""Buffers that layers write to while they run: running means, counts of tokens, ranges of a quantiser.

Without chunks they are written to once a forward. In chunks every chunk writes to them, and its rerun once
more: they would come to something else, unseen, and be saved with the model.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from chunkdist.errors import UnsupportedModelError


class WrittenBuffers:
    """The buffers of some modules, as they are when a forward begins."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._before = [
            (module, name, x, _version(x))
            for root in modules
            for module in root.modules()
            for name, x in module._buffers.items()
            if x is not None
        ]

    def refuse(self) -> None:
        """When the forward ends.

        Raises:
            UnsupportedModelError: one has been written to, or replaced.
        """
        for module, name, x, version in self._before:
            if module._buffers.get(name) is not x or _version(x) != version:
                raise UnsupportedModelError(
                    f"the buffer {name} of {type(module).__name__} is written to while its layer runs, and "
                    "in chunks would be written to once a chunk, and again in the backward: keep such "
                    "figures in a hook on the whole layer, which gets the whole sequence once, or stop "
                    "them while training"
                )


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version
