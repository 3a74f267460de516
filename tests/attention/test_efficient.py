"""`efficient` behind a stand-in of torch's operators that is written from their sources."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from chunkdist.attention import AttentionChoice
from chunkdist.attention.base import AttentionVariant
from chunkdist.attention.efficient import EfficientBackend, why_wrong
from tests.attention import reference
from tests.attention.reference import CASES, assert_exact, dense, run, run_in_chunks

BACKEND = EfficientBackend()
PLAIN = AttentionVariant(scale=1.0)
TAKEN = {name: case for name, case in CASES.items() if case.softcap is None and case.window is None}


class Kernel:
    """kernel_forward.h and kernel_backward.h: (B, tokens, heads, D), no shared kv heads."""

    bottom_right = True

    def _weights(self, q: Tensor, k: Tensor, mask_type: int, scale: float) -> tuple[Tensor, Tensor]:
        assert mask_type in (0, 2)
        assert q.stride(-1) == k.stride(-1) == 1
        assert q.shape[0] == k.shape[0], "batches"
        assert q.shape[2] == k.shape[2], "heads"
        scores = torch.einsum("bthd,bshd->bhts", q, k) * scale
        num_queries, num_keys = scores.shape[-2:]
        offset = num_keys - num_queries if self.bottom_right else 0
        if mask_type == 0:
            return scores, torch.zeros(scores.shape[-2:], dtype=torch.bool)
        hidden = torch.arange(num_keys) > torch.arange(num_queries)[:, None] + offset
        return scores.masked_fill(hidden, -torch.inf), hidden

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, bias: None, cu_q: None, cu_k: None, max_q: None, max_k: None,
        dropout_p: float, mask_type: int, with_lse: bool = False, *, scale: float | None = None,
        seqlen_k: None = None, window_size: None = None,
    ) -> tuple[Any, ...]:  # fmt: skip
        assert (dropout_p, with_lse) == (0.0, True)
        assert scale is not None
        scores, _ = self._weights(q, k, mask_type, scale)
        lse = scores.logsumexp(-1)
        padded = lse.new_full((*lse.shape[:2], -(-lse.shape[2] // 32) * 32), torch.inf)
        padded[..., : lse.shape[2]] = lse
        out = torch.einsum("bhts,bshd->bthd", torch.exp(scores - lse[..., None]), v)
        unread = torch.empty((), dtype=torch.int64)
        return out, padded, unread, unread, q.shape[1], k.shape[1]

    def backward(
        self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: None, out: Tensor, cu_q: None,
        cu_k: None, max_q: int, max_k: int, lse: Tensor, dropout_p: float, seed: Tensor, offset: Tensor,
        mask_type: int, bias_requires_grad: bool, *, scale: float | None = None,
        num_splits_key: None = None, window_size: None = None, shared_storage_dqdkdv: bool = False,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        assert scale is not None
        assert (max_q, max_k) == (q.shape[1], k.shape[1])
        assert lse.shape[-1] % 32 == 0
        assert lse.is_contiguous()
        assert bool((lse[..., max_q:] == torch.inf).all())
        scores, _ = self._weights(q, k, mask_type, scale)
        weights = torch.exp(scores - lse[..., :max_q, None])
        dv = torch.einsum("bhts,bthd->bshd", weights, grad_out)
        row_dot = (grad_out * out).sum(-1).transpose(1, 2)[..., None]
        dscores = weights * (torch.einsum("bthd,bshd->bhts", grad_out, v) - row_dot) * scale
        dq = torch.einsum("bhts,bshd->bthd", dscores, k)
        return dq, torch.einsum("bhts,bthd->bshd", dscores, q), dv, q.new_empty(0)


class TopLeftKernel(Kernel):
    """A wrong one: query i stands at key i."""

    bottom_right = False


@pytest.fixture
def install() -> Iterator[Callable[[Kernel], None]]:
    """Puts a kernel behind torch's operators on CPU, until the test ends."""
    libraries: list[Any] = []

    def put(kernel: Kernel) -> None:
        library: Any = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
        library.impl("_efficient_attention_forward", kernel.forward, "CPU")
        library.impl("_efficient_attention_backward", kernel.backward, "CPU")
        libraries.append(library)

    why_wrong.cache_clear()
    yield put
    why_wrong.cache_clear()
    for library in libraries:
        library._destroy()


@pytest.mark.parametrize("name", TAKEN)
def test_equal_to_dense_attention(name: str, install: Callable[..., None]) -> None:
    install(Kernel())
    tensors = TAKEN[name].tensors(torch.float64)
    assert_exact(run(BACKEND, TAKEN[name], *tensors), dense(TAKEN[name], *tensors))


@pytest.mark.parametrize("chunk_size", [1, 8, 100])
def test_a_stream_in_chunks_is_the_whole_stream(chunk_size: int, install: Callable[..., None]) -> None:
    install(Kernel())
    tensors = reference.SEQUENCE.tensors(torch.float64)
    found = run_in_chunks(BACKEND, reference.SEQUENCE, chunk_size, *tensors)
    assert_exact(found, dense(reference.SEQUENCE, *tensors))


def test_the_first_use_is_checked(install: Callable[..., None]) -> None:
    install(Kernel())
    assert why_wrong(torch.device("cpu"), torch.float32, 64) is None
    why_wrong.cache_clear()
    install(TopLeftKernel())
    assert "its out is off by" in str(why_wrong(torch.device("cpu"), torch.float32, 64))


@pytest.mark.parametrize(
    ("dtype", "head_dim", "variant", "words"),
    [
        (torch.float64, 64, PLAIN, "the tensors are float64"),
        (torch.float32, 36, PLAIN, "head dims that 8 divides"),
        (torch.float32, 64, AttentionVariant(scale=1.0, softcap=2.0), "no soft-cap"),
        (torch.float32, 64, AttentionVariant(scale=1.0, window=8), "without a sliding window"),
        (torch.float32, 64, PLAIN, "an NVIDIA GPU, the tensors are on cpu"),
    ],
)
def test_why_not(dtype: torch.dtype, head_dim: int, variant: AttentionVariant, words: str) -> None:
    assert words in str(BACKEND.why_not(torch.empty(1, 1, head_dim, dtype=dtype), variant))


def test_fake_tensors_run_the_real_operators() -> None:
    """Shapes and dtypes of what the planner counts, without a GPU."""
    case = reference.LONG
    with FakeTensorMode():
        q, k, v, grad_out = (torch.empty(x.shape) for x in case.tensors(torch.float32))
        assert BACKEND.why_not(q, case.variant) is None
        found = run(BACKEND, case, q, k, v, grad_out)
    assert {name: x.shape for name, x in found.items()} == {
        "out": q.shape, "lse": (8, 1500), "dq": q.shape, "dk": k.shape, "dv": v.shape,
    }  # fmt: skip


@pytest.mark.parametrize(("capability", "first"), [((8, 6), "varlen"), ((9, 0), "cudnn")])
def test_math_on_a_gpu_is_a_warning(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], first: str
) -> None:
    """It says what was asked before, on Hopper `cudnn` first."""
    q: Any = torch.empty(1, 1, 64, dtype=torch.float32)
    with caplog.at_level(logging.WARNING):
        AttentionChoice("auto").backend_for(q, AttentionVariant(scale=1.0, softcap=2.0))
    assert not caplog.records, "on a CPU it is what there is"

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    class OnGpu:
        device, dtype, shape = torch.device("cuda", 0), torch.float64, (1, 1, 64)

    with caplog.at_level(logging.WARNING):
        AttentionChoice("auto").backend_for(OnGpu(), PLAIN)  # type: ignore[arg-type]
    (record,) = caplog.records
    assert "10 to 50 times slower" in record.getMessage()
    told = record.getMessage()
    assert "not varlen: it takes float16 and bfloat16" in told
    asked = [name for name in re.findall(r"not (\w+):", told) if name != "cpu_flash"]
    assert asked[0] == first


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_kernels_of_this_gpu(dtype: torch.dtype) -> None:
    assert why_wrong(torch.device("cuda", 0), dtype, 128) is None
