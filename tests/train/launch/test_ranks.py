"""Settings under which ranks would wait for ever, or nothing could be saved, are refused before training."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.utils import DistributedType

from chunkdist import ChunkConfig, chunk_model, unchunk_model
from chunkdist.train.launch.ranks import check_engine, check_ranks
from tests.helpers.models import tiny_llama


def arguments(
    *, gathers: bool = True, even: bool = True, drops: bool = False, zero3: bool = True, **values: Any
) -> Any:
    deepspeed = SimpleNamespace(is_zero3=lambda: True, get_value=lambda name: gathers)
    given = {
        "hf_deepspeed_config": deepspeed if zero3 else None,
        "accelerator_config": SimpleNamespace(even_batches=even),
        "dataloader_drop_last": drops,
        "average_tokens_across_devices": True,
        "fsdp": None,
        "fsdp_config": None,
        **values,
    }
    return SimpleNamespace(**given)


def test_zero3_must_be_able_to_save() -> None:
    check_engine(arguments())
    with pytest.raises(ValueError, match=r"stage3_gather_16bit_weights.*zero_optimization\.stage=3"):
        check_engine(arguments(gathers=False))


def test_ranks_have_the_same_number_of_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    check_engine(arguments(even=False))
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_engine(arguments(even=False, drops=True))
    with pytest.raises(ValueError, match="even_batches=False with 2 ranks and dataloader_drop_last=False"):
        check_engine(arguments(even=False))


def test_losses_are_those_of_the_global_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    check_engine(arguments(average_tokens_across_devices=False))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="average_tokens_across_devices=False with 2 ranks"):
        check_engine(arguments(average_tokens_across_devices=False))


def test_fsdp1_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    check_engine(arguments(zero3=False))
    by_trainer = arguments(zero3=False, fsdp=True, fsdp_config={"version": 1})
    with pytest.raises(ValueError, match=r"fsdp_version=1 .* fsdp_version=2 only"):
        check_engine(by_trainer)
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(ValueError, match=r"fsdp_version=1 .* fsdp_version=2 only"):
        check_engine(arguments(zero3=False))


def test_a_run_that_does_not_shard_as_it_was_told_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpus = SimpleNamespace(num_processes=1, distributed_type=DistributedType.MULTI_CPU)
    check_ranks(on_cpus)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    check_ranks(SimpleNamespace(num_processes=1, distributed_type=DistributedType.FSDP))
    with pytest.raises(RuntimeError, match=r"ACCELERATE_USE_FSDP=true, .*distributed_type=MULTI_CPU"):
        check_ranks(on_cpus)


def test_layers_are_marked_as_leaves_before_deepspeed_is_imported() -> None:
    model = chunk_model(tiny_llama(), ChunkConfig(chunk_size=4))
    assert all(layer._z3_leaf for layer in model.model.layers)
    unchunk_model(model)
    assert not any(hasattr(layer, "_z3_leaf") for layer in model.model.layers)
