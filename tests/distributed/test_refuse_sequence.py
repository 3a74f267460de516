"""Sequence and context parallelism as people switch it on, on 2 ranks: chunked models refuse to run in it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from chunkdist import ChunkConfig, chunk_model
from chunkdist.train.launch.ranks import allow_fsdp, skip_shm_build, tell_ranks
from tests.distributed.ranks import Ranks
from tests.helpers.models import batch, tiny_llama

CONFIG = ChunkConfig(chunk_size=4)
NUM_TOKENS = 16
ULYSSES = "DeepSpeed has a sequence-parallel group"


def model() -> Any:
    return tiny_llama(attn_implementation="sdpa", dtype=torch.float32, num_layers=2)


def my_part() -> dict[str, Tensor]:
    """Half of a row's tokens, with their positions, as data loaders of such groups hand them out."""
    whole = {**batch(num_tokens=NUM_TOKENS), "position_ids": torch.arange(NUM_TOKENS)[None]}
    half = NUM_TOKENS // 2
    start = distributed.get_rank() * half
    return {name: x[:, start : start + half] for name, x in whole.items()}


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(ValueError, match=r".") as refused:
        call()
    return str(refused.value)


@contextmanager
def left_as_it_was() -> Iterator[None]:
    """Ranks stay for the next case."""
    import deepspeed.runtime.sequence_parallel.parallel_state_sp as state
    from accelerate.state import AcceleratorState
    from deepspeed.utils import groups
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    environment = dict(os.environ)
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS._local_mapping.pop("sdpa", None)
        state._release_sequence_parallel_groups()
        groups.mpu = None
        unset_hf_deepspeed_config()
        AcceleratorState._reset_state(True)
        os.environ.clear()
        os.environ.update(environment)


def ulysses_in_a_plain_loop(registered_first: bool) -> list[str]:
    """DeepSpeed's attention and its engine, as its own tutorial has them."""
    import deepspeed
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    skip_shm_build()
    with left_as_it_was():
        deepspeed.init_distributed("gloo")
        chunked = model() if registered_first else chunk_model(model(), CONFIG)
        mpu = UlyssesSPAttentionHF.register_with_transformers(
            model_name_or_path=chunked,
            core_attn_implementation="sdpa",
            sequence_parallel_size=2,
            micro_batch_size=1,
        )
        if registered_first:
            return [refusal(lambda: chunk_model(chunked, CONFIG))]
        said = [refusal(lambda: chunked(**my_part(), use_cache=False))]
        engine, *_ = deepspeed.initialize(
            model=chunked,
            optimizer=torch.optim.SGD(chunked.parameters(), lr=0.1),
            config={
                "train_micro_batch_size_per_gpu": 1,
                "zero_optimization": {"stage": 2},
                "zero_allow_untested_optimizer": True,
            },
            mpu=mpu,
        )
        return [*said, refusal(lambda: engine(**my_part(), use_cache=False))]


def context_parallel_in_a_plain_loop() -> str:
    from torch.distributed.tensor.experimental import context_parallel

    chunked = chunk_model(model(), CONFIG)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("cp",))
    given = batch(num_tokens=NUM_TOKENS)
    with context_parallel(mesh, buffers=[*given.values()], buffer_seq_dims=[1, 1]):
        assert given["input_ids"].shape[1] == NUM_TOKENS // 2
        return refusal(lambda: chunked(**given, use_cache=False))


def sharded_on_such_a_mesh() -> str:
    """A ring of one's own: the mesh alone tells. Weights are sharded over it, too."""
    chunked = chunk_model(model(), CONFIG)
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp_shard", "cp"))._flatten("dp_shard_cp")
    for layer in chunked.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(chunked, mesh=mesh)
    return refusal(lambda: chunked(**batch(num_tokens=NUM_TOKENS), use_cache=False))


def whole_sequences_on_a_mesh() -> float:
    chunked = chunk_model(model(), CONFIG)
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp_shard", "cp"))["dp_shard"]
    return float(chunked(**batch(num_tokens=NUM_TOKENS), use_cache=False).loss) + 0 * mesh.ndim


def a_part_by_hand() -> str | None:
    """Only the first rank's positions begin at 0."""
    chunked = chunk_model(model(), CONFIG)
    if distributed.get_rank() == 0:
        return None
    return refusal(lambda: chunked(**my_part(), use_cache=False))


def trainer(size: str, after_the_trainer: bool) -> str:
    """transformers' Trainer, told to cut sequences in two."""
    from accelerate.state import PartialState
    from accelerate.utils import DeepSpeedSequenceParallelConfig, ParallelismConfig
    from transformers import Trainer, TrainingArguments

    skip_shm_build()
    row = {name: x[0] for name, x in batch(num_tokens=NUM_TOKENS).items()}
    row["position_ids"] = torch.arange(NUM_TOKENS)
    with left_as_it_was(), tempfile.TemporaryDirectory() as folder:
        sizes: dict[str, Any] = {size: 2}
        if size == "sp_size":
            sizes["sp_handler"] = DeepSpeedSequenceParallelConfig(
                sp_seq_length_is_variable=True, sp_attn_implementation="sdpa"
            )
        settings: dict[str, Any] = {"parallelism_config": ParallelismConfig(**sizes)}
        if size == "sp_size":
            os.environ.pop("ACCELERATE_USE_CPU", None)
            settings["deepspeed"] = {
                "zero_optimization": {"stage": 2},
                "train_micro_batch_size_per_gpu": 1,
                "zero_allow_untested_optimizer": True,
            }
        else:
            state = PartialState(cpu=True, backend="gloo")
            allow_fsdp(state)
            settings |= {"fsdp": "full_shard", "fsdp_config": {"version": 2}}
        args = TrainingArguments(
            folder, per_device_train_batch_size=1, max_steps=1, report_to="none", optim="sgd", use_cpu=True,
            disable_tqdm=True, save_strategy="no", **settings,
        )  # fmt: skip
        if size == "sp_size":
            import deepspeed

            deepspeed.init_distributed("gloo")
            tell_ranks(PartialState())
        else:
            allow_fsdp(PartialState())
        made: nn.Module = model()
        if not after_the_trainer:
            chunk_model(made, CONFIG)
        runs = Trainer(model=made, args=args, train_dataset=[row] * 4)
        if after_the_trainer:
            return refusal(lambda: chunk_model(made, CONFIG))
        return refusal(runs.train)


@pytest.mark.parametrize("registered_first", [False, True])
def test_ulysses_in_a_plain_loop(two_ranks: Ranks, registered_first: bool) -> None:
    for messages in two_ranks.run(ulysses_in_a_plain_loop, registered_first):
        assert len(messages) == 2 - registered_first
        assert all(message.startswith(ULYSSES) and "leave Ulysses" in message for message in messages)


def test_context_parallel_in_a_plain_loop(two_ranks: Ranks) -> None:
    for message in two_ranks.run(context_parallel_in_a_plain_loop):
        assert message.startswith("torch's context_parallel is active")


def test_a_mesh_with_a_dim_for_sequences(two_ranks: Ranks) -> None:
    for message in two_ranks.run(sharded_on_such_a_mesh):
        assert "device mesh with the dim 'cp'" in message
    assert two_ranks.run(whole_sequences_on_a_mesh)


def test_a_part_by_hand(two_ranks: Ranks) -> None:
    first, second = two_ranks.run(a_part_by_hand)
    assert first is None
    assert second.startswith("position_ids begin after 0")


@pytest.mark.parametrize("after_the_trainer", [False, True])
@pytest.mark.parametrize("size", ["sp_size", "cp_size"])
def test_transformers_trainer(two_ranks: Ranks, size: str, after_the_trainer: bool) -> None:
    for message in two_ranks.run(trainer, size, after_the_trainer):
        assert f"{size}=2" in message
        assert f"write {size}=1" in message
