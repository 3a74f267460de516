"""Settings that an engine cannot honour are refused, with what was set and what to write instead."""

from __future__ import annotations

import os
import re
import signal
import time
from datetime import timedelta

import pytest
import torch
from torch import distributed
from torch.distributed.fsdp import fully_shard

from chunkdist import ChunkConfig, chunk_model
from chunkdist.train.launch.failures import FailureWatch, RankFailure, named_failures, speaks_here
from tests.distributed.cases import Case, build, chunk_config, deepspeed_engine, micro_batches
from tests.distributed.ranks import RankError, Ranks


def zero3_before_chunks() -> str:
    case = Case(engine="zero3")
    model = build(case, torch.float32)
    engine = deepspeed_engine(model, case)
    chunk_model(model, chunk_config(case))
    return _refusal(engine, case)


def units_inside_a_layer() -> str:
    case = Case(engine="fsdp2")
    model = chunk_model(build(case, torch.float64), ChunkConfig(chunk_size=4))
    for layer in model.model.layers:  # type: ignore[union-attr]
        fully_shard(layer.mlp)  # type: ignore[union-attr]
        fully_shard(layer)
    fully_shard(model)
    return _refusal(model, case)


def units_across_groups() -> str:
    case = Case(engine="fsdp2", layers_per_group=2)
    model = chunk_model(build(case, torch.float64), chunk_config(case))
    layers = list(model.model.layers)  # type: ignore[union-attr]
    fully_shard(layers[:1])
    fully_shard(layers[1:3])
    fully_shard(layers[3:])
    fully_shard(model)
    return _refusal(model, case)


def _refusal(model: torch.nn.Module, case: Case) -> str:
    with pytest.raises(ValueError, match=r".") as refused:
        model(**micro_batches(case, distributed.get_rank())[0])
    return str(refused.value)


def test_zero3_refuses_layers_that_are_no_leaves(two_ranks: Ranks) -> None:
    for message in two_ranks.run(zero3_before_chunks):
        assert "chunk_model before deepspeed.initialize" in message


def test_fsdp2_refuses_units_inside_a_layer(two_ranks: Ranks) -> None:
    for message in two_ranks.run(units_inside_a_layer):
        assert "fully_shard was applied to 'mlp'" in message


def test_fsdp2_refuses_units_across_groups(two_ranks: Ranks) -> None:
    for message in two_ranks.run(units_across_groups):
        assert "layers_per_group=2" in message
        assert "fully_shard" in message


def fail_on(rank: int) -> None:
    if distributed.get_rank() == rank:
        raise RuntimeError("the disk of this rank is gone")
    distributed.barrier()


def die_on(rank: int) -> None:
    if distributed.get_rank() == rank:
        os._exit(3)
    time.sleep(60)


def test_the_harness_names_a_failing_rank() -> None:
    ranks = Ranks(2)
    with pytest.raises(
        RankError, match=r"rank 1 failed:\n(.*\n)*RuntimeError: the disk of this rank is gone"
    ):
        ranks.run(fail_on, 1)
    with pytest.raises(RankError, match="rank 0 failed:\ndied with exit code 3"):
        ranks.run(die_on, 0)


def be_killed(rank: int) -> str:
    """What the other rank says."""
    watch = FailureWatch()
    distributed.barrier()
    if distributed.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(RankFailure) as failure, named_failures(watch):
        distributed.all_reduce(torch.ones(1))
    assert speaks_here(failure.value)
    return str(failure.value)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_is_named(rank: int) -> None:
    """And by one that lives: rank 0, which says such things, may be the one."""
    ranks = Ranks(2, may_die=(rank,))
    said = ranks.run(be_killed, rank)
    ranks.stop()
    assert said[rank] is None
    assert re.fullmatch(rf"rank {rank} is gone \(process \d+ was killed, or has crashed\)", said[1 - rank])


def come_late(rank: int) -> str | None:
    """What the other rank says."""
    watch = FailureWatch()
    group = distributed.new_group(timeout=timedelta(seconds=1))
    if distributed.get_rank() == rank:
        time.sleep(10)
        return None
    with pytest.raises(RankFailure) as failure, named_failures(watch):
        distributed.all_reduce(torch.ones(1), group=group)
    return str(failure.value)


def test_a_rank_that_hangs_is_named() -> None:
    ranks = Ranks(2)
    said = ranks.run(come_late, 1)
    ranks.stop()
    assert said == ["rank 1 did not come to a collective within the timeout (ddp_timeout)", None]
