"""Attention of a chunk over the prefix: one registered function, one file a kernel."""

from __future__ import annotations

import logging
from typing import get_args

import torch
from torch import Tensor

from chunkdist.attention.base import AttentionVariant, Backend
from chunkdist.attention.cpu_flash import CpuFlashBackend
from chunkdist.attention.cudnn import CudnnBackend
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
    MathBackend(),
)
"""In the order in which `auto` asks them; the last one can do everything. `cudnn`, whose plans are for one
shape each, comes after those that take any."""

assert {backend.name for backend in BACKENDS} == set(get_args(AttentionName)) - {"auto"}


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
        for backend in BACKENDS:
            if self._name not in ("auto", backend.name):
                continue
            why_not = backend.why_not(q, variant)
            if why_not is None:
                reason = "as configured" if self._name != "auto" else "; ".join(["first here", *passed_over])
                if self.reasons.setdefault(backend.name, reason) is reason:
                    logger.info("chunkdist: attention %s: %s", backend.name, reason)
                return backend
            passed_over.append(f"not {backend.name}: {why_not}")
        raise UnsupportedModelError(
            f"attention={self._name!r} cannot run this model ({'; '.join(passed_over)}): write 'auto'"
        )
