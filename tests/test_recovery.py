"""Out of memory inside `recovering()`: the step goes to its end, and computes nothing more."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from chunkdist import ChunkConfig, chunk_model
from chunkdist.memory.live_bytes import LiveBytes
from chunkdist.recovery import attempt, is_out_of_memory, recovering
from tests.helpers.models import batch, tiny_llama
from tests.helpers.planted_memory import Place, memory_for


@pytest.mark.parametrize("place", ["forward", "backward", "loss"])
def test_the_step_ends_and_the_next_one_is_exact(place: Place) -> None:
    model = chunk_model(tiny_llama(num_layers=3), ChunkConfig(chunk_size=8, retained_chunks=1))
    inputs = {**batch(num_tokens=24), "use_cache": False}
    model(**inputs).loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    with LiveBytes() as live, memory_for(4, place) as refused, recovering() as recovery:
        loss = model(**inputs).loss
        loss.backward()
        assert len(refused) == 1  # nothing more was tried
    assert isinstance(recovery.error, torch.OutOfMemoryError)
    assert all(p.grad is not None for p in model.parameters())
    assert loss.isfinite()
    model.zero_grad(set_to_none=True)
    del loss
    assert live.current_bytes == 0  # nothing is held, by the error or by anything else
    model(**inputs).loss.backward()
    for name, p in model.named_parameters():
        assert torch.equal(p.grad, expected[name]), name  # type: ignore[arg-type]


def test_layers_without_gradients() -> None:
    model: Any = tiny_llama(num_layers=3)
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[0].requires_grad_(False)
    chunk_model(model, ChunkConfig(chunk_size=8))
    with memory_for(4, "forward", group=2) as refused, recovering() as recovery:
        model(**batch(num_tokens=24), use_cache=False).loss.backward()
    assert refused == [8]
    assert recovery.error is not None


def test_the_losss_own_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    model = chunk_model(tiny_llama(num_layers=2), ChunkConfig(chunk_size=8))
    loss = model(**batch(num_tokens=24), use_cache=False).loss

    def refuse(*args: object) -> None:
        raise torch.OutOfMemoryError("planted: out of memory")

    with recovering() as recovery:
        monkeypatch.setattr(torch.Tensor, "__mul__", refuse)
        loss.backward()
        monkeypatch.undo()
    assert recovery.error is not None
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


def test_outside_it_is_an_error() -> None:
    model = chunk_model(tiny_llama(num_layers=2), ChunkConfig(chunk_size=8))
    with memory_for(4, "backward"), pytest.raises(torch.OutOfMemoryError):
        model(**batch(num_tokens=24), use_cache=False).loss.backward()


@pytest.mark.parametrize(
    "said",
    [
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    ],
)
def test_libraries_have_too_little_memory_in_other_words(said: str) -> None:
    def fail() -> str:
        raise RuntimeError(said)

    with recovering() as recovery:
        assert attempt(fail, lambda: "instead") == "instead"
    assert str(recovery.error) == said
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))


def test_other_errors_are_not_recovered_from() -> None:
    def fail() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with recovering(), pytest.raises(RuntimeError, match="illegal memory access"):
        attempt(fail, lambda: None)
