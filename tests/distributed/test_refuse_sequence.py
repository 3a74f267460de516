"""Sequence and context parallelism as people switch it on, on 2 ranks: chunked models take part in that of
DeepSpeed, and refuse to run in any other."""

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
from chunkdist.train.launch.ranks import allow_fsdp, skip_shm_build
from tests.distributed.ranks import Ranks
from tests.helpers.models import batch, gradients, tiny_llama

CONFIG = ChunkConfig(chunk_size=4)
NUM_TOKENS = 16


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


def ulysses_in_a_plain_loop(registered_first: bool) -> float:
    """DeepSpeed's attention, as its own tutorial has it: chunks share rows in its group. The relative error
    of the largest gradient."""
    import deepspeed
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    whole = gradients(model(), batch(num_tokens=NUM_TOKENS))
    skip_shm_build()
    with left_as_it_was():
        deepspeed.init_distributed("gloo")
        chunked = model() if registered_first else chunk_model(model(), CONFIG)
        UlyssesSPAttentionHF.register_with_transformers(
            model_name_or_path=chunked,
            core_attn_implementation="sdpa",
            sequence_parallel_size=2,
            micro_batch_size=1,
        )
        if registered_first:
            chunk_model(chunked, CONFIG)
        found = gradients(chunked, {**my_part(), "num_items_in_batch": NUM_TOKENS - 1})
    errors = []
    for name, x in found.items():
        distributed.all_reduce(x)
        errors.append(float((x - whole[name]).norm() / whole[name].norm()))
    return max(errors)


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


def trainer(after_the_trainer: bool) -> str:
    """transformers' Trainer, told to cut sequences in two."""
    from accelerate.state import PartialState
    from accelerate.utils import ParallelismConfig
    from transformers import Trainer, TrainingArguments

    row = {name: x[0] for name, x in batch(num_tokens=NUM_TOKENS).items()}
    row["position_ids"] = torch.arange(NUM_TOKENS)
    with left_as_it_was(), tempfile.TemporaryDirectory() as folder:
        allow_fsdp(PartialState(cpu=True, backend="gloo"))
        args = TrainingArguments(
            folder, per_device_train_batch_size=1, max_steps=1, report_to="none", optim="sgd", use_cpu=True,
            disable_tqdm=True, save_strategy="no", fsdp="full_shard", fsdp_config={"version": 2},
            parallelism_config=ParallelismConfig(cp_size=2),
        )  # fmt: skip
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
    assert max(two_ranks.run(ulysses_in_a_plain_loop, registered_first)) < 1e-5


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
def test_transformers_trainer(two_ranks: Ranks, after_the_trainer: bool) -> None:
    for message in two_ranks.run(trainer, after_the_trainer):
        assert "cp_size=2" in message
        assert "write cp_size=1" in message
