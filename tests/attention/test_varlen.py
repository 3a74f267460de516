from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from chunkdist.attention import varlen
from chunkdist.attention.base import AttentionRow, AttentionVariant, RowGradient
from chunkdist.attention.math import MathBackend
from chunkdist.attention.varlen import VarlenBackend, pack, simulated_workspace
from tests.attention import reference, standins
from tests.attention.reference import CASES, HALF, assert_exact, assert_no_worse, dense, run, run_in_chunks
from tests.attention.standins import FlashKernel

BACKEND = VarlenBackend()
PLAIN = AttentionVariant(scale=1.0)
UNCAPPED = {name: case for name, case in CASES.items() if case.softcap is None}


@pytest.fixture
def install() -> Iterator[Callable[[FlashKernel], FlashKernel]]:
    """Puts a kernel behind torch's operators on CPU, until the test ends."""
    libraries = []

    def put(kernel: FlashKernel) -> FlashKernel:
        libraries.append(standins.aten_in_place(kernel))
        return kernel

    yield put
    for library in libraries:
        library._destroy()


@pytest.mark.parametrize("name", UNCAPPED)
def test_equal_to_dense_attention(name: str, install: Callable[..., FlashKernel]) -> None:
    install(FlashKernel((torch.float64,)))
    tensors = CASES[name].tensors(torch.float64)
    assert_exact(run(BACKEND, CASES[name], *tensors), dense(CASES[name], *tensors))


@pytest.mark.parametrize("seed", range(20))
def test_equal_to_dense_attention_for_random_spans(seed: int, install: Callable[..., FlashKernel]) -> None:
    install(FlashKernel((torch.float64,)))
    case = reference.random_case(seed)
    tensors = case.tensors(torch.float64, seed=seed)
    assert_exact(run(BACKEND, case, *tensors), dense(case, *tensors))


@pytest.mark.parametrize("chunk_size", [1, 4, 8, 100])
@pytest.mark.parametrize("window", [None, 6])
def test_a_stream_in_chunks_is_the_whole_stream(
    chunk_size: int, window: int | None, install: Callable[..., FlashKernel]
) -> None:
    install(FlashKernel((torch.float64,)))
    case = replace(reference.SEQUENCE, window=window)
    tensors = case.tensors(torch.float64)
    assert_exact(run_in_chunks(BACKEND, case, chunk_size, *tensors), dense(case, *tensors))


WRONG_KERNELS = [
    (standins.TopLeftKernel, "prefix"),
    (standins.TopLeftKernel, "segments"),
    (standins.WideWindowKernel, "window"),
    (standins.NarrowWindowKernel, "window"),
    (standins.DeafKernel, "sinks"),
]


@pytest.mark.parametrize(("kernel", "name"), WRONG_KERNELS)
def test_a_kernel_with_another_convention_is_found(
    kernel: type[FlashKernel], name: str, install: Callable[..., FlashKernel]
) -> None:
    install(kernel((torch.float64,)))
    tensors = CASES[name].tensors(torch.float64)
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        assert_exact(run(BACKEND, CASES[name], *tensors), dense(CASES[name], *tensors))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", ["segments", "window, foreign keys", "sinks"])
def test_half_precision(name: str, dtype: torch.dtype, install: Callable[..., FlashKernel]) -> None:
    install(FlashKernel())
    case = CASES[name]
    tensors = case.tensors(dtype)
    got = run(BACKEND, case, *tensors)
    assert got["lse"].dtype == torch.float32
    assert all(got[key].dtype == dtype for key in ("out", "dq", "dk", "dv"))
    assert_no_worse(got, dense(case, *(x.double() for x in tensors)), dense(case, *tensors))


@pytest.mark.parametrize(("kernel", "name"), WRONG_KERNELS)
def test_half_precision_does_not_hide_another_convention(
    kernel: type[FlashKernel], name: str, install: Callable[..., FlashKernel]
) -> None:
    install(kernel())
    case = CASES[name]
    tensors = case.tensors(torch.bfloat16)
    with pytest.raises(AssertionError, match="the plain way"):
        assert_no_worse(
            run(BACKEND, case, *tensors), dense(case, *(x.double() for x in tensors)), dense(case, *tensors)
        )


def test_a_merged_log_sum_exp_of_any_layout_is_read_right(install: Callable[..., FlashKernel]) -> None:
    install(FlashKernel((torch.float64,)))
    case = CASES["prefix"]
    q, k, v, grad_out = case.tensors(torch.float64)
    with torch.no_grad():
        out, lse = BACKEND.forward(row := AttentionRow(q, k, v, case.spans, case.variant))
        kv_grads = torch.zeros_like(k), torch.zeros_like(v)
        other_layout = lse.T.contiguous().T
        dq = BACKEND.backward(row, RowGradient(grad_out, out, other_layout, kv_grads))
    expected = dense(case, q, k, v, grad_out)
    got = dict(zip(("dq", "dk", "dv"), (dq, *kv_grads), strict=True))
    assert_exact(got, {key: expected[key] for key in got})


def test_the_prefix_is_not_copied_and_a_window_shortens_it(install: Callable[..., FlashKernel]) -> None:
    kernel = install(FlashKernel((torch.float64,)))
    case = replace(CASES["window, foreign keys"], window=5)
    tensors = case.tensors(torch.float64)
    run(BACKEND, case, *tensors)
    assert len(kernel.keys_seen) == 2
    for keys in kernel.keys_seen:
        assert keys.untyped_storage().data_ptr() == tensors[1].untyped_storage().data_ptr()
        assert keys.shape[0] == sum(case.lengths) + 4  # of 9 in the segment, and 4 of others


def test_the_stand_ins_have_the_operators_signatures() -> None:
    for operator, stand_in in (
        (torch.ops.aten._flash_attention_forward.default, standins.aten_forward(FlashKernel())),
        (torch.ops.aten._flash_attention_backward.default, standins.aten_backward(FlashKernel())),
    ):
        known = [(p.name, p.kind is p.KEYWORD_ONLY) for p in inspect.signature(stand_in).parameters.values()]
        real = [(a.name, a.kwarg_only) for a in operator._schema.arguments]
        assert known[: len(real)] == real  # torch 2.13 has two more than 2.11, which nothing here passes


def test_fake_tensors_run_without_a_gpu_and_count_the_kernels_workspace() -> None:
    case = CASES["foreign keys"]
    with FakeTensorMode(), torch.no_grad():
        q, k, v, grad_out = (torch.empty(x.shape, dtype=torch.bfloat16) for x in case.tensors(torch.bfloat16))
        assert BACKEND.why_not(q, PLAIN) is None
        out, lse = BACKEND.forward(row := AttentionRow(q, k, v, case.spans, case.variant))
        kv_grads = torch.zeros_like(k), torch.zeros_like(v)
        dq = BACKEND.backward(row, RowGradient(grad_out, out, lse, kv_grads))
        workspace = simulated_workspace(q, k, 2)
    assert (out.shape, lse.shape, lse.dtype) == (q.shape, (4, 9), torch.float32)
    assert dq.shape == q.shape
    rows = 9 + 2 * 128
    assert [x.shape for x in workspace] == [(rows, 4, 32), (4, rows), (18, 4, 16), (18, 4, 16)]
    assert simulated_workspace(torch.empty(1, 1, 8), torch.empty(1, 1, 8), 1) == ()


def test_cumulative_lengths() -> None:
    case = CASES["foreign keys"]
    q, k, v, _ = case.tensors(torch.float32)
    packed = pack(AttentionRow(q, k, v, case.spans, case.variant))
    assert (packed.first_key, packed.max_q, packed.max_k) == (6, 5, 8)
    assert (packed.cu_q.tolist(), packed.cu_k.tolist()) == ([0, 5, 9], [0, 8, 12])
    assert packed.cu_q.dtype == packed.cu_k.dtype == torch.int32


@pytest.mark.parametrize(
    ("q", "variant", "reason"),
    [
        (torch.empty(2, 2, 64, dtype=torch.bfloat16), PLAIN, "the tensors are on cpu"),
        (torch.empty(2, 2, 64), PLAIN, "float16 and bfloat16, the tensors are float32"),
        (
            torch.empty(2, 2, 12, dtype=torch.bfloat16),
            PLAIN,
            "head dims up to 256 that 8 divides, this one is 12",
        ),
        (
            torch.empty(2, 2, 264, dtype=torch.bfloat16),
            PLAIN,
            "head dims up to 256 that 8 divides, this one is 264",
        ),
    ],
)
def test_why_not(q: torch.Tensor, variant: AttentionVariant, reason: str) -> None:
    assert reason in str(BACKEND.why_not(q, variant))


@pytest.mark.parametrize(
    ("capability", "head_dim", "variant", "reason"),
    [
        ((7, 5), 64, PLAIN, "needs compute capability 8.0, the GPU has 7.5"),
        ((8, 0), 64, AttentionVariant(scale=1.0, softcap=30.0), "no soft-cap"),
        ((8, 9), 224, PLAIN, None),  # the kernel of head dim 256 runs, without dropout
        ((12, 0), 200, PLAIN, None),
        ((8, 0), 224, PLAIN, None),
        ((8, 6), 256, PLAIN, None),
        ((9, 0), 128, AttentionVariant(scale=1.0, window=7), None),
    ],
)
def test_why_not_on_a_gpu(
    capability: tuple[int, int],
    head_dim: int,
    variant: AttentionVariant,
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    q: Any = SimpleNamespace(device=torch.device("cuda:0"), dtype=torch.bfloat16, shape=(2, 2, head_dim))
    got = BACKEND.why_not(q, variant)
    assert got is None if reason is None else reason in str(got)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", [*UNCAPPED, "long"])
def test_the_real_kernel(name: str, dtype: torch.dtype) -> None:
    case = reference.LONG if name == "long" else CASES[name]
    reference.check_on_gpu(BACKEND, MathBackend(), case, dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 100])
def test_the_real_kernel_on_a_stream_in_chunks(window: int | None) -> None:
    case = replace(reference.LONG, prefix=0, foreign=0, window=window)
    reference.check_on_gpu(BACKEND, MathBackend(), case, torch.bfloat16, chunk_size=256)


def test_heads_are_taken_in_parts_where_scratch_space_is_short(
    install: Callable[..., FlashKernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = install(FlashKernel((torch.float64,)))
    case = reference.SEQUENCE
    tensors = case.tensors(torch.float64)
    num_kv_heads = tensors[1].shape[1]
    whole = run(BACKEND, case, *tensors)
    seen = {keys.shape[1] for keys in kernel.keys_seen}
    assert seen == {num_kv_heads}
    kernel.keys_seen.clear()
    monkeypatch.setattr(varlen, "SCRATCH_BYTES", 1)
    assert_exact(run(BACKEND, case, *tensors), whole)
    assert [keys.shape[1] for keys in kernel.keys_seen] == [num_kv_heads] + [1] * num_kv_heads
