"""fp32 as fp32: where it stands for the truth, no product of it may be rounded to TF32 or bf16 on its way.

torch has a setting for everything (`torch.backends.fp32_precision`, which transformers' `tf32: true` sets),
one for each backend and for each kind of operation, and the older one of all matrix products
(`torch.set_float32_matmul_precision`). What is not set follows the wider setting (torch 2.9 and later).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_IEEE = "ieee"
_SETTINGS = (
    ("generic", "all"),
    *(("cuda", kind) for kind in ("all", "matmul", "conv", "rnn")),
    *(("mkldnn", kind) for kind in ("all", "matmul", "conv", "rnn")),
)
"""The widest first: what followed it follows it again afterwards."""


@contextmanager
def ieee_fp32() -> Iterator[None]:
    """Inside, fp32 operations compute in fp32, on any device, in all threads; afterwards as before."""
    older = _older_setting()
    if older is not None:
        torch.set_float32_matmul_precision("highest")
    changed: list[tuple[str, str, str]] = []
    try:
        for backend, kind in _SETTINGS:
            found = torch._C._get_fp32_precision_getter(backend, kind)
            if found != _IEEE:
                torch._C._set_fp32_precision_setter(backend, kind, _IEEE)
                changed.append((backend, kind, found))
        yield
    finally:
        for backend, kind, found in reversed(changed):
            torch._C._set_fp32_precision_setter(backend, kind, found)
        if older is not None:
            torch.set_float32_matmul_precision(older)


def _older_setting() -> str | None:
    """`None`: it is the highest precision, or torch does not tell since both kinds of settings were made."""
    try:
        found = torch.get_float32_matmul_precision()
    except RuntimeError:
        return None
    return None if found == "highest" else found
