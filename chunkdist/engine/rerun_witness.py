"""Some numbers of what each cell came to in the forward, against those of its rerun.

What hangs on a layer's modules is put back for the rerun (`as_run`). What a hook or a module reads elsewhere
cannot be: a global, a context variable, an object of the user's own, such as the strength of a steering
vector that is switched off before the backward. The rerun would then compute the gradient of another
function. Its output shows it.

A retained chunk needs no witness: its backward goes through the graph of the forward itself, and nothing is
run again.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import Variable

from chunkdist.errors import UnsupportedModelError

_NUM_SAMPLES = 128
"""Numbers of each cell's output, at least, where there are as many."""
_TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-2}
_HALF_TOLERANCE = 0.1
"""Bound, relative to the norm. A rerun rounds as the forward did, but for keys and values that are rebuilt in
pieces of other sizes, and kernels that add in any order."""


class RerunWitness:
    """The cells of one forward of a group, by chunk index; in a pipeline, those of a step, by micro-batch."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        self._name = " and ".join(dict.fromkeys(type(layer).__name__ for layer in layers))
        self._noted: dict[int, Tensor] = {}
        self._pairs: list[tuple[Tensor, Tensor]] = []
        self._is_narrow = False

    def note(self, index: int, hidden: Tensor) -> None:
        """In the forward: `hidden` (B, C, H) is what the cell came to."""
        if not hidden.is_meta and not isinstance(hidden, FakeTensor):
            self._noted[index] = _sample(hidden)
            self._is_narrow = torch.is_autocast_enabled(hidden.device.type)

    def compare(self, index: int, hidden: Tensor) -> None:
        """In the backward: it has come to this."""
        if (noted := self._noted.get(index)) is not None:
            self._pairs.append((noted, _sample(hidden)))

    def refuse_others(self) -> None:
        """When the group's backward ends. A GPU is not waited for before that of the whole model ends.

        Raises:
            UnsupportedModelError: reruns have come to something else.
        """
        pairs, self._pairs = self._pairs, []
        if not pairs:
            return
        before, now = (torch.cat(samples) for samples in zip(*pairs, strict=True))
        tolerance = _HALF_TOLERANCE if self._is_narrow else _TOLERANCES.get(before.dtype, _HALF_TOLERANCE)
        before, now = before.double(), now.double()
        differ = (now - before).norm() > tolerance * before.norm()  # NaN is NaN in both

        def read() -> None:
            if bool(differ):
                raise UnsupportedModelError(
                    f"{self._name} came to other hidden states when it was run again in the backward than in "
                    "the forward: something that a hook or module in it reads has changed in between (a "
                    "global, a context variable, an attribute of an object that is no module), or it draws "
                    "numbers of its own; call backward before it changes"
                )

        if differ.is_cuda:
            Variable._execution_engine.queue_callback(read)  # torch 2.13
        else:
            read()


def _sample(hidden: Tensor) -> Tensor:
    """Spread over tokens and features: an odd step does not meet the same features at each token."""
    flat = hidden.detach().reshape(-1)
    return flat[:: (flat.numel() // _NUM_SAMPLES) | 1].clone()
