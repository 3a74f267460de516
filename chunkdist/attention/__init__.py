"""Attention of a chunk over the prefix: one registered function, one file a kernel."""

from __future__ import annotations

import logging
from typing import get_args

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from chunkdist.attention.base import AttentionVariant, Backend
from chunkdist.attention.cpu_flash import CpuFlashBackend
from chunkdist.attention.cudnn import CudnnBackend
from chunkdist.attention.efficient import EfficientBackend
from chunkdist.attention.flash_attn import FlashAttnBackend
from chunkdist.attention.math import MathBackend
from chunkdist.attention.varlen import VarlenBackend
from chunkdist.config import AttentionName
from chunkdist.errors import UnsupportedModelError

logger = logging.getLogger(__name__)

BACKENDS: tuple[Backend, ...] = (
    CpuFlashBackend(),
    VarlenBackend(),
    FlashAttnBackend(),
    CudnnBackend(),
    EfficientBackend(),
    MathBackend(),
)
"""In the order in which `auto` asks them, but on Hopper; the last one can do everything. `cudnn`, whose plans
are for one shape each, comes after those that take any."""

SLOWER = "perhaps 10 to 50 times slower than a kernel; write bf16: true where that is the reason"

assert {backend.name for backend in BACKENDS} == set(get_args(AttentionName)) - {"auto"}


def _in_order(q: Tensor) -> tuple[Backend, ...]:
    """On Hopper cuDNN comes first: its makers give it about twice the rate of flash-attn 2 there, and its
    first use is checked."""
    if (
        q.device.type != "cuda"
        or isinstance(q, FakeTensor)
        or torch.cuda.get_device_capability(q.device)[0] != 9
    ):
        return BACKENDS
    return tuple(sorted(BACKENDS, key=lambda backend: backend.name != "cudnn"))


class AttentionChoice:
    """Picks the backend of each kind of attention call, and says why, once for each."""

    def __init__(self, name: AttentionName) -> None:
        self._name = name
        self._chosen: dict[tuple[str, torch.dtype, int, AttentionVariant], Backend] = {}
        self.reasons: dict[str, str] = {}
        """Backend name -> why it was taken, for what ran so far."""

    def backend_for(self, q: Tensor, variant: AttentionVariant) -> Backend:
        key = (q.device.type, q.dtype, q.shape[-1], variant)
        if key not in self._chosen:
            self._chosen[key] = self._choose(q, variant)
        return self._chosen[key]

    def _choose(self, q: Tensor, variant: AttentionVariant) -> Backend:
        passed_over: list[str] = []
        for backend in _in_order(q):
            if self._name not in ("auto", backend.name):
                continue
            why_not = backend.why_not(q, variant)
            if why_not is None:
                reason = "as configured" if self._name != "auto" else "; ".join(["first here", *passed_over])
                if self.reasons.setdefault(backend.name, reason) is reason:
                    logger.info("chunkdist: attention %s: %s", backend.name, reason)
                    if isinstance(backend, MathBackend) and q.device.type == "cuda":
                        logger.warning("chunkdist: attention runs on `math`, %s: %s", SLOWER, reason)
                return backend
            passed_over.append(f"not {backend.name}: {why_not}")
        raise UnsupportedModelError(
            f"attention={self._name!r} cannot run this model ({'; '.join(passed_over)}): write 'auto'"
        )
