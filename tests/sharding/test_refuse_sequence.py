"""Sequences that something else cuts between ranks, or seems to, are refused; what only looks like it is
not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import ParallelismConfig
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from chunkdist import ChunkConfig, chunk_model
from chunkdist.sharding.refuse_sequence import refuse_mesh
from chunkdist.train.launch.ranks import check_engine
from tests.helpers.models import batch, gradients, largest_difference, tiny_llama
from tests.train.launch.test_ranks import arguments

CONFIG = ChunkConfig(chunk_size=8)


@contextmanager
def accelerate_with(**sizes: int) -> Iterator[None]:
    """Accelerate's state as a trainer leaves it that was given these sizes."""
    shared = AcceleratorState._shared_state
    before = dict(shared)
    shared["parallelism_config"] = ParallelismConfig(**sizes)
    try:
        yield
    finally:
        shared.clear()
        shared.update(before)


@contextmanager
def attention_replaced() -> Iterator[None]:
    """As sequence-parallel attention is put in the place of transformers', under another's name."""

    @wraps(sdpa_attention_forward)
    def gathering(*args: Any, **kwargs: Any) -> Any:
        return sdpa_attention_forward(*args, **kwargs)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = gathering
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]


@contextmanager
def torch_attention_replaced() -> Iterator[None]:
    own = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = lambda *args, **kwargs: own(*args, **kwargs)  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = own


@contextmanager
def dispatch_enabled() -> Iterator[None]:
    """torch's newer way, in which attention modules hand over distributed tensors."""
    from torch.distributed.tensor.experimental import _attention

    _attention._enable_context_parallel_dispatcher()
    try:
        yield
    finally:
        _attention._disable_context_parallel_dispatcher()


REPLACED: dict[str, tuple[Callable[[], Any], str]] = {
    "cp_size": (lambda: accelerate_with(cp_size=2), "cp_size=2: .*write cp_size=1"),
    "transformers' function": (
        attention_replaced,
        r"'sdpa' of transformers has been replaced by .*test_refuse_sequence",
    ),
    "torch's function": (torch_attention_replaced, "scaled_dot_product_attention has been replaced"),
    "torch's dispatch": (dispatch_enabled, "context_parallel is active: .*leave the context manager out"),
}


@pytest.mark.parametrize("name", REPLACED)
def test_seen_by_chunk_model_and_in_the_forward(name: str) -> None:
    around, message = REPLACED[name]
    chunked = chunk_model(tiny_llama(attn_implementation="sdpa"), CONFIG)
    with around():
        with pytest.raises(ValueError, match=message):
            chunk_model(tiny_llama(attn_implementation="sdpa"), CONFIG)
        with pytest.raises(ValueError, match=message):
            chunked(**batch())
        with torch.no_grad(), pytest.raises(ValueError, match=message):
            chunked.eval()(**batch(), use_cache=False)
    assert chunked.train()(**batch()).loss.isfinite()


def test_a_group_that_nobody_has_made() -> None:
    """Of Accelerate's `sp_size`, without DeepSpeed. What trains is cut, what evaluates is whole."""
    with accelerate_with(sp_size=2):
        chunked = chunk_model(tiny_llama(attn_implementation="sdpa"), CONFIG)
        with pytest.raises(ValueError, match=r"sp_size=2, and DeepSpeed has made no group"):
            chunked(**batch())
        with torch.no_grad():
            assert chunked.eval()(**batch(), use_cache=False).loss.isfinite()


def test_a_users_own_attention_under_its_own_name_is_no_fault() -> None:
    with attention_replaced(), accelerate_with(dp_shard_size=2):
        assert chunk_model(tiny_llama(attn_implementation="plain"), CONFIG)(**batch()).loss.isfinite()


def test_exchanging_modules_in_the_model() -> None:
    model = tiny_llama()
    kind = type("DistributedAttention", (nn.Module,), {"__module__": "deepspeed.sequence.layer"})
    model.model.layers[1].self_attn.add_module("exchange", kind())
    with pytest.raises(ValueError, match=r"DistributedAttention of deepspeed.*take it out"):
        chunk_model(model, CONFIG)


def mesh(**dims: int) -> Any:
    made = SimpleNamespace(mesh_dim_names=tuple(dims), size=lambda dim: list(dims.values())[dim])
    made._get_root_mesh = lambda: made
    return made


def test_mesh_dims() -> None:
    for harmless in (
        {"dp_replicate": 2, "dp_shard": 2},
        {"dp_shard": 4, "cp": 1},
        {"tp": 2},
        {"dp_shard_cp": 2},
    ):
        refuse_mesh(mesh(**harmless))
    refuse_mesh(SimpleNamespace(mesh_dim_names=None))
    for name in ("cp", "sp", "sequence_parallel", "context", "ulysses"):
        with pytest.raises(ValueError, match=f"the dim '{name}'"):
            refuse_mesh(mesh(dp_shard=2, **{name: 2}))
    flat = mesh(dp_shard_cp=4)
    flat._get_root_mesh = lambda: mesh(dp_shard=2, cp=2)
    with pytest.raises(ValueError, match="the dim 'cp'"):
        refuse_mesh(flat)


def row(*positions: Tensor) -> Tensor:
    return torch.cat(positions)[None]


PADDING = torch.ones(3, dtype=torch.long)
PARTS = {
    "the second half": row(torch.arange(12, 24)),
    "every other token": row(torch.arange(1, 25, 2)),
    "both ends of the middle": row(torch.arange(6, 12), torch.arange(12, 18)),
    "one row of two": torch.stack([torch.arange(12), torch.arange(5, 17)]),
    "coordinates": torch.arange(12, 24).expand(3, 1, 12),
    "plain positions before coordinates": torch.arange(12, 24).expand(4, 1, 12),
}
WHOLE = {
    "one sequence": row(torch.arange(12)),
    "packed": row(torch.arange(7), torch.arange(5)),
    "left padding at 1": row(PADDING, torch.arange(9)),
    "left padding at 0": row(PADDING * 0, torch.arange(9)),
    "right padding at 1": row(torch.arange(9), PADDING),
}


def inputs(positions: Tensor, *, masked: bool) -> dict[str, Any]:
    given: dict[str, Any] = {**batch(num_rows=positions.shape[-2], num_tokens=12), "position_ids": positions}
    return {**given, "attention_mask": torch.ones_like(given["input_ids"])} if masked else given


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", PARTS)
def test_positions_of_a_part(name: str, masked: bool) -> None:
    model = chunk_model(tiny_llama(), ChunkConfig(chunk_size=5))
    with pytest.raises(ValueError, match="position_ids begin after 0"):
        model(**inputs(PARTS[name], masked=masked), use_cache=False)


def test_positions_of_a_part_beside_the_bounds_of_segments() -> None:
    bounds = torch.tensor([0, 5, 12], dtype=torch.int32)
    extra = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 7, "max_length_k": 7}
    model = chunk_model(tiny_llama(), ChunkConfig(chunk_size=5))
    packed = row(torch.arange(5), torch.arange(7))
    assert model(**inputs(packed, masked=False), **extra, use_cache=False).loss.isfinite()
    with pytest.raises(ValueError, match="position_ids begin after 0"):
        model(**inputs(packed + 5, masked=False), **extra, use_cache=False)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", WHOLE)
def test_positions_of_whole_sequences(name: str, masked: bool) -> None:
    given = inputs(WHOLE[name], masked=masked)
    expected = gradients(tiny_llama(), given)
    found = gradients(chunk_model(tiny_llama(), ChunkConfig(chunk_size=5)), given)
    assert largest_difference(found, expected) < 1e-10


def test_the_launchers_options(monkeypatch: pytest.MonkeyPatch) -> None:
    check_engine(arguments(parallelism_config=ParallelismConfig(dp_shard_size=2)))
    for given in (ParallelismConfig(cp_size=2), {"cp_size": 2}):
        with pytest.raises(ValueError, match=r"cp_size=2 in parallelism_config.*write cp_size: 1"):
            check_engine(arguments(parallelism_config=given))
    monkeypatch.setenv("PARALLELISM_CONFIG_SP_SIZE", "2")
    check_engine(arguments(parallelism_config=None))
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    with pytest.raises(ValueError, match=r"sp_size=2 in parallelism_config.*write sp_size: 1"):
        check_engine(arguments(parallelism_config=None))
    monkeypatch.delenv("ACCELERATE_USE_PARALLELISM_CONFIG")
    deepspeed = SimpleNamespace(is_zero3=lambda: False, get_value={"sequence_parallel_size": 2}.get)
    with pytest.raises(ValueError, match="sequence_parallel_size=2 in the DeepSpeed config"):
        check_engine(arguments(hf_deepspeed_config=deepspeed))
