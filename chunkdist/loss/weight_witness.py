"""Tells whether tensors have been written to since: by their versions, and by some of their numbers.

Versions alone miss engines that write to `.data`, as ZeRO does after a step. Nothing here waits for a GPU
before somebody asks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

_SAMPLES_PER_DIM = 32


@dataclass(frozen=True, kw_only=True)
class WeightWitness:
    """Tensors as they were at one moment."""

    tensors: tuple[Tensor, ...]
    versions: tuple[int | None, ...]
    samples: tuple[Tensor, ...]

    @classmethod
    def of(cls, tensors: Iterable[Tensor]) -> WeightWitness:
        kept = tuple(tensors)
        return cls(tensors=kept, versions=tuple(map(_version, kept)), samples=tuple(map(_sample, kept)))

    def still_holds(self, tensors: Iterable[Tensor]) -> bool:
        """Whether these are the same tensors, and nobody has written to them."""
        now = WeightWitness.of(tensors)
        return (
            len(now.tensors) == len(self.tensors)
            and all(x is y for x, y in zip(now.tensors, self.tensors, strict=True))
            and now.versions == self.versions
            and all(_same(x, y) for x, y in zip(now.samples, self.samples, strict=True))
        )


def _version(x: Tensor) -> int | None:
    return None if x.is_inference() else x._version


@torch.no_grad()
def _sample(x: Any) -> Tensor:
    """At most about a thousand numbers, spread over the tensor: of this rank's shard, if it is sharded."""
    if isinstance(x, DTensor):
        x = x.to_local()
    elif not x.numel() and isinstance(shard := getattr(x, "ds_tensor", None), Tensor):
        x = shard  # ZeRO-3's (DeepSpeed 0.19), which leaves the parameter empty
    strides = tuple(slice(None, None, max(1, size // _SAMPLES_PER_DIM)) for size in x.shape)
    sample: Tensor = x.detach()[strides].clone()
    return sample


def _same(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and bool(((x == y) | ((x != x) & (y != y))).all())
