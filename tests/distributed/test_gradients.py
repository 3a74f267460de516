"""Gradients under every engine are those of one process that averages the same data: all parameters."""

from __future__ import annotations

from typing import Any

import pytest
from tests.distributed.cases import Case, errors_of
from tests.distributed.ranks import Ranks

FP64, FP32 = ("ddp", "fsdp2", "fsdp2 groups", "fsdp2 head"), ("zero1", "zero2", "zero3")
VARIANTS: dict[str, dict[str, Any]] = {
    "1 chunk against 40": {},
    "LoRA": {"lora": True},
    "retained chunks": {"retained_chunks": 3},
    "LoRA, retained chunks": {"lora": True, "retained_chunks": 3},
    "a rank of ignored labels": {"ignored_rank": 1, "lengths": (13, 22)},
    "accumulation": {"num_micro_batches": 3, "lengths": (5, 30)},
    "clipping": {"max_grad_norm": 0.05},
    "LoRA, accumulation, clipping": {"lora": True, "num_micro_batches": 3, "max_grad_norm": 0.05, "lengths": (5, 30)},
    "tied embeddings": {"tied": True, "lengths": (13, 22)},
    "each rank's own mean": {"mean_per_rank": True, "lengths": (13, 22)},
}
GROUPS: dict[str, tuple[Any, ...]] = {name: (1, 2, "all") for name in (*FP64, *FP32)} | {"zero3": (1,)}
CASES = [
    pytest.param(Case(engine=engine, layers_per_group=height, **values), id=f"{engine}-group{height}-{name}")
    for engine in (*FP64, *FP32)  # type: ignore[attr-defined]
    for name, values in VARIANTS.items()
    for height in (GROUPS[engine] if len(values) < 2 or engine in ("fsdp2", "zero2") else GROUPS[engine][:1])
]


def check(ranks: Ranks, case: Case) -> None:
    in_fp64 = case.engine in FP64
    for errors in ranks.run(errors_of, case):
        assert errors.gradients < (1e-10 if in_fp64 else 1e-5)
        assert errors.loss < 1e-6  # computed in fp32 whatever the model's dtype
        assert errors.updates < (1e-10 if in_fp64 else 1e-4)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks(two_ranks: Ranks, case: Case) -> None:
    check(two_ranks, case)
