from __future__ import annotations

from tests.distributed.conftest import four_ranks, two_ranks

__all__ = ["four_ranks", "two_ranks"]
