"""Gradients under every engine are those of one process that averages the same data: all parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch

from chunkdist import IndependentSampler
from chunkdist.spaco.sample import ChunkSample
from chunkdist.stream.stream import Stream, cut
from tests.distributed.cases import CHUNK_SIZE, Case, EngineName, errors_of
from tests.distributed.ranks import Ranks

FP64: tuple[EngineName, ...] = ("ddp", "fsdp2", "fsdp2 groups", "fsdp2 head")
FP32: tuple[EngineName, ...] = ("zero1", "zero2", "zero3")
VARIANTS: dict[str, dict[str, Any]] = {
    "1 chunk against 40": {"lengths": (CHUNK_SIZE, 40 * CHUNK_SIZE)},
    "LoRA": {"lora": True, "attention": "cpu_flash"},
    "retained chunks": {"retained_chunks": 3},
    "a rank of ignored labels": {"ignored_rank": 1},
    "accumulation": {"num_micro_batches": 3},
    "clipping": {"max_grad_norm": 0.05},
    "tied embeddings": {"tied": True},
    "each rank's own mean": {"mean_per_rank": True},
    "LoRA, retained chunks, accumulation, clipping": {
        "lora": True, "retained_chunks": 3, "num_micro_batches": 3, "max_grad_norm": 0.05,
    },
}  # fmt: skip
SPACO: dict[str, dict[str, Any]] = {
    "SpaCO": {"spaco": True},
    "SpaCO, LoRA": {"spaco": True, "attention": "cpu_flash", "lora": True},
}
OF_SPACO: tuple[EngineName, ...] = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
OF_GROUPS = ("1 chunk against 40", "LoRA, retained chunks, accumulation, clipping", "accumulation")
"""The variants that are run with groups of 2 and of all layers, too."""


def cases(engines: Iterable[EngineName]) -> Iterator[Any]:
    for engine in engines:
        for name, values in (VARIANTS | (SPACO if engine in OF_SPACO else {})).items():
            heights: tuple[Any, ...] = (1, 2, "all") if name in OF_GROUPS else (1,)
            for height in heights:
                case = Case(engine=engine, layers_per_group=height, **values)
                yield pytest.param(case, id=f"{engine}-group{height}-{name}")


def check(ranks: Ranks, case: Case) -> None:
    in_fp64 = case.engine in FP64
    for errors in ranks.run(errors_of, case):
        assert errors.gradients < (1e-10 if in_fp64 else 1e-5)
        assert errors.loss < 1e-6  # computed in fp32 whatever the model's dtype
        assert errors.updates < (1e-10 if in_fp64 else 1e-5)


@pytest.mark.parametrize("case", list(cases((*FP64, *FP32))))
def test_two_ranks(two_ranks: Ranks, case: Case) -> None:
    check(two_ranks, case)


@pytest.mark.parametrize(
    "values",
    [
        {"engine": "ddp", "layers_per_group": "all"},
        {"engine": "fsdp2", "retained_chunks": 2, "num_micro_batches": 2},
        {"engine": "fsdp2 groups", "layers_per_group": 2, "lora": True},
        {"engine": "zero3"},
    ],
    ids=lambda x: x["engine"],
)
def test_ranks_with_different_trees(two_ranks: Ranks, values: dict[str, Any]) -> None:
    check(two_ranks, Case(trees=True, **values))


@pytest.mark.parametrize("retained", [0, 2])
def test_host_offload(two_ranks: Ranks, retained: int) -> None:
    check(two_ranks, Case(engine="fsdp2", offload="host", retained_chunks=retained, num_micro_batches=2))


def draws() -> list[tuple[float, ...]]:
    """Weights of 40 chunks, drawn twice from one seed, and once more."""
    num_tokens = 40 * CHUNK_SIZE
    stream = Stream(num_tokens=num_tokens, chunks=cut(num_tokens, CHUNK_SIZE), segment_starts=((0,),))
    sample = ChunkSample(IndependentSampler(budget=20), stream)
    found = []
    for seed in (3, 3, None):
        if seed is not None:
            torch.manual_seed(seed)
        sample.draw(torch.ones(1, num_tokens, 2))
        found.append(sample.weights)
    return found


def test_every_rank_draws_its_own_sample(two_ranks: Ranks) -> None:
    """Trainers give all ranks one seed."""
    of_ranks = two_ranks.run(draws)
    for first, again, another in of_ranks:
        assert first == again != another
    assert of_ranks[0][0] != of_ranks[1][0]
