"""Image-text models under sharding engines: gradients of decoder and tower are those of one process."""

from __future__ import annotations

import pytest

from tests.distributed.cases import Case, errors_of
from tests.distributed.ranks import Ranks


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_two_ranks(two_ranks: Ranks, engine: str) -> None:
    """Features of images are added between the decoder's layers, too."""
    case = Case(engine=engine, images="Qwen3VLForConditionalGeneration")  # type: ignore[arg-type]
    for errors in two_ranks.run(errors_of, case):
        assert errors.gradients < (1e-10 if engine == "fsdp2" else 1e-5)
        assert errors.loss < 1e-6
        assert errors.updates < (1e-10 if engine == "fsdp2" else 1e-5)
