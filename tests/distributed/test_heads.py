"""The output layer under every engine, tied or not, trained whole by PEFT or not: the step without chunks."""

from __future__ import annotations

import pytest

from tests.distributed.cases import EngineName
from tests.distributed.heads import difference, difference_of_logits
from tests.distributed.ranks import RankError, Ranks

UNDER: tuple[EngineName, ...] = ("ddp", "fsdp2", "fsdp2 head", "zero2", "zero3")
WAYS = [(wrapped, tied) for wrapped in (False, True) for tied in (False, True)]


def check(engine: EngineName | None, found: tuple[float, float, int]) -> None:
    gradients, loss, num_tiled = found
    assert num_tiled > 0, "all logits exist"
    assert gradients < (1e-5 if engine in ("zero2", "zero3") else 1e-10)
    assert loss < 1e-6  # in fp32


@pytest.mark.parametrize(("wrapped", "tied"), WAYS)
def test_one_process(wrapped: bool, tied: bool) -> None:
    check(None, difference(None, wrapped, tied))


@pytest.mark.parametrize("engine", UNDER)
@pytest.mark.parametrize(("wrapped", "tied"), WAYS)
def test_two_ranks(two_ranks: Ranks, engine: EngineName, wrapped: bool, tied: bool) -> None:
    for found in two_ranks.run(difference, engine, wrapped, tied):
        check(engine, found)


def test_a_loss_of_the_logits_behind_ddp_that_finds_unused_parameters_is_refused(two_ranks: Ranks) -> None:
    with pytest.raises(RankError, match="were given as they are to a function that torch cannot see"):
        two_ranks.run(difference_of_logits, "ddp", True)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "fsdp2 head", "zero2", "zero3"])
def test_a_loss_of_the_logits(two_ranks: Ranks, engine: EngineName) -> None:
    for error in two_ranks.run(difference_of_logits, engine):
        assert error < (1e-5 if engine in ("zero2", "zero3") else 1e-10)
