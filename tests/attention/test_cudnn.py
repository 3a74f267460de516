"""cuDNN's attention in squares, with a stand-in for the kernels; the real ones where there is a GPU."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from chunkdist import ChunkConfig, UnsupportedModelError, chunk_model
from chunkdist.attention import cudnn, varlen
from chunkdist.attention.base import AttentionRow, AttentionVariant, RowGradient
from chunkdist.attention.cudnn import CudnnBackend, why_wrong
from chunkdist.attention.math import MathBackend
from tests.attention import cudnn_standin as standin
from tests.attention import reference, standins
from tests.attention.cudnn_standin import CudnnKernel
from tests.attention.reference import CASES, HALF, assert_exact, assert_no_worse, dense, run, run_in_chunks
from tests.attention.standins import FlashKernel
from tests.helpers.models import batch, gradients, largest_difference, tiny_llama

BACKEND = CudnnBackend()
PLAIN = AttentionVariant(scale=1.0)
CPU = torch.device("cpu")
KNOWN = {name: case for name, case in CASES.items() if case.window is None and case.softcap is None}
Install = Callable[[CudnnKernel], CudnnKernel]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Puts a kernel behind torch's operators on CPU, until the test ends, which takes any length."""
    libraries = []

    def put(kernel: CudnnKernel) -> CudnnKernel:
        libraries.append(standin.aten_in_place(kernel))
        return kernel

    monkeypatch.setattr(cudnn, "MULTIPLE", 1)
    why_wrong.cache_clear()
    yield put
    why_wrong.cache_clear()
    for library in libraries:
        library._destroy()


@pytest.mark.parametrize("name", KNOWN)
def test_equal_to_dense_attention(name: str, install: Install) -> None:
    install(CudnnKernel((torch.float64,)))
    tensors = KNOWN[name].tensors(torch.float64)
    assert_exact(run(BACKEND, KNOWN[name], *tensors), dense(KNOWN[name], *tensors))


@pytest.mark.parametrize("seed", range(10))
def test_equal_to_dense_attention_for_random_spans(seed: int, install: Install) -> None:
    install(CudnnKernel((torch.float64,)))
    case = replace(reference.random_case(seed), window=None)
    tensors = case.tensors(torch.float64, seed=seed)
    assert_exact(run(BACKEND, case, *tensors), dense(case, *tensors))


@pytest.mark.parametrize("chunk_size", [1, 4, 8, 100])
def test_a_stream_in_chunks_is_the_whole_stream(chunk_size: int, install: Install) -> None:
    install(CudnnKernel((torch.float64,)))
    tensors = reference.SEQUENCE.tensors(torch.float64)
    assert_exact(
        run_in_chunks(BACKEND, reference.SEQUENCE, chunk_size, *tensors), dense(reference.SEQUENCE, *tensors)
    )


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", ["segments", "sinks"])
def test_half_precision(name: str, dtype: torch.dtype, install: Install) -> None:
    install(CudnnKernel())
    case = CASES[name]
    tensors = case.tensors(dtype)
    got = run(BACKEND, case, *tensors)
    assert got["lse"].dtype == torch.float32
    assert all(got[key].dtype == dtype for key in ("out", "dq", "dk", "dv"))
    assert_no_worse(got, dense(case, *(x.double() for x in tensors)), dense(case, *tensors))


def test_layouts_of_the_backward_are_the_same_whatever_they_are_at_the_caller(install: Install) -> None:
    """The stand-in finds plans again as torch does, and refuses to run one made for other layouts."""
    install(CudnnKernel((torch.float64,)))
    case = CASES["prefix"]
    q, k, v, grad_out = case.tensors(torch.float64)
    for other in (grad_out, grad_out.transpose(0, 1).contiguous().transpose(0, 1)):
        assert_exact(run(BACKEND, case, q, k, v, other), dense(case, q, k, v, other))


def test_the_prefix_is_not_copied(install: Install) -> None:
    kernel = install(CudnnKernel((torch.float64,)))
    case = CASES["prefix"]
    tensors = case.tensors(torch.float64)
    run(BACKEND, case, *tensors)
    assert [keys.shape[2] for keys in kernel.keys_seen] == [7, 12, 7, 12]
    storage = tensors[1].untyped_storage().data_ptr()
    assert all(keys.untyped_storage().data_ptr() == storage for keys in kernel.keys_seen)


def test_heads_are_taken_in_parts_where_scratch_space_is_short(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = install(CudnnKernel((torch.float64,)))
    case = reference.SEQUENCE
    tensors = case.tensors(torch.float64)
    whole = run(BACKEND, case, *tensors)
    monkeypatch.setattr(varlen, "SCRATCH_BYTES", 1)
    kernel.keys_seen.clear()
    assert_exact(run(BACKEND, case, *tensors), whole)
    assert {keys.shape[1] for keys in kernel.keys_seen[len(case.lengths) :]} == {1}


@pytest.fixture
def others() -> Iterator[FlashKernel]:
    """What is behind `varlen`."""
    kernel = FlashKernel((torch.float64,))
    library = standins.aten_in_place(kernel)
    yield kernel
    library._destroy()


@pytest.mark.parametrize(
    ("lengths", "prefix", "expected"),
    [
        ((8, 4), 12, [8, 12, 4, 8, 12, 4]),
        ((8, 3, 4, 4), 12, [8, 12, 4, 4, 8, 12, 4, 4]),
        ((8, 4), 6, [4, 4]),
        ((6, 4), 12, [4, 4]),
        ((1, 8, 2), 4, [8, 8]),
        ((3, 5), 2, []),
    ],
)
def test_lengths_that_are_no_multiples_go_to_another_kernel(
    lengths: tuple[int, ...],
    prefix: int,
    expected: list[int],
    install: Install,
    others: FlashKernel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernel = install(CudnnKernel((torch.float64,)))
    monkeypatch.setattr(cudnn, "MULTIPLE", 4)
    case = reference.Case(lengths=lengths, prefix=prefix, foreign=3)
    tensors = case.tensors(torch.float64)
    assert_exact(run(BACKEND, case, *tensors), dense(case, *tensors))
    assert [keys.shape[2] for keys in kernel.keys_seen] == expected
    assert (len(others.keys_seen) == 0) == (sum(expected) == 2 * (sum(lengths) + prefix))


@pytest.mark.parametrize("chunk_size", [8, 20])
def test_a_stream_in_chunks_of_which_some_go_to_another_kernel(
    chunk_size: int, install: Install, others: FlashKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = install(CudnnKernel((torch.float64,)))
    monkeypatch.setattr(cudnn, "MULTIPLE", 4)
    case = reference.Case(lengths=(32, 13))
    tensors = case.tensors(torch.float64)
    assert_exact(run_in_chunks(BACKEND, case, chunk_size, *tensors), dense(case, *tensors))
    assert kernel.keys_seen
    assert others.keys_seen


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_right_kernel_passes_the_check_of_the_first_use(
    dtype: torch.dtype, head_dim: int, install: Install
) -> None:
    install(CudnnKernel())
    assert why_wrong(CPU, dtype, head_dim) is None


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        (standin.BinaryKernel, "on this device its out is off by"),
        (standin.DeafKernel, "on this device its dq is off by"),
        (standin.FirstHeadKernel, "on this device its dk is off by"),
        (standin.DenseKernel, "on this device its dk is off by"),
        (standin.AbsentKernel, "cudnn refuses: cuDNN Frontend error: No valid execution plans built."),
    ],
)
def test_a_wrong_kernel_is_found_by_the_check_of_the_first_use(
    kernel: type[CudnnKernel], reason: str, install: Install
) -> None:
    install(kernel())
    found = why_wrong(CPU, torch.bfloat16, 64)
    assert found is not None
    assert found.startswith(reason)
    assert "\n" not in found


def test_squares_only(install: Install) -> None:
    """With causal masks for squares alone, it does not matter at which corner they begin."""
    install(standin.BottomRightKernel((torch.float64,)))
    tensors = CASES["segments"].tensors(torch.float64)
    assert_exact(run(BACKEND, CASES["segments"], *tensors), dense(CASES["segments"], *tensors))


def test_a_whole_model(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install(CudnnKernel((torch.float64,)))
    monkeypatch.setattr(CudnnBackend, "why_not", lambda self, q, variant: None)
    expected = gradients(tiny_llama(num_layers=2), batch(num_tokens=20))
    model = chunk_model(tiny_llama(num_layers=2), ChunkConfig(chunk_size=8, attention="cudnn"))
    assert largest_difference(gradients(model, batch(num_tokens=20)), expected) < 1e-12


def test_without_a_gpu_it_is_refused_by_name() -> None:
    model = chunk_model(tiny_llama().bfloat16(), ChunkConfig(chunk_size=8, attention="cudnn"))
    with pytest.raises(
        UnsupportedModelError, match="not cudnn: it runs on an NVIDIA GPU, the tensors are on"
    ):
        gradients(model, batch())


@pytest.mark.parametrize(
    ("variant", "version", "deterministic", "reason"),
    [
        (PLAIN, 91900, False, None),
        (PLAIN, 91500, False, "it needs cuDNN 91501, this torch has 91500"),
        (PLAIN, None, False, "it needs cuDNN 91501, this torch has none"),
        (PLAIN, 91900, True, "its backward is not deterministic"),
        (AttentionVariant(scale=1.0, window=3), 91900, False, "without a sliding window"),
        (AttentionVariant(scale=1.0, softcap=3.0), 91900, False, "no soft-cap"),
    ],
)
def test_why_not(
    variant: AttentionVariant,
    version: int | None,
    deterministic: bool,
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checked = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    monkeypatch.setattr(cudnn, "why_wrong", lambda *asked: checked.append(asked))
    q: Any = SimpleNamespace(device=torch.device("cuda:0"), dtype=torch.bfloat16, shape=(2, 2, 128))
    got = BACKEND.why_not(q, variant)
    assert got is None if reason is None else reason in str(got)
    assert checked == ([] if reason else [(torch.device("cuda:0"), torch.bfloat16, 128)])


def test_the_stand_ins_have_the_operators_signatures() -> None:
    for operator, stand_in in (
        (torch.ops.aten._scaled_dot_product_cudnn_attention.default, standin.aten_forward(CudnnKernel())),
        (
            torch.ops.aten._scaled_dot_product_cudnn_attention_backward.default,
            standin.aten_backward(CudnnKernel()),
        ),
    ):
        known = [(p.name, p.kind is p.KEYWORD_ONLY) for p in inspect.signature(stand_in).parameters.values()]
        assert known == [(a.name, a.kwarg_only) for a in operator._schema.arguments]


def test_fake_tensors_run_without_a_gpu() -> None:
    case = CASES["foreign keys"]
    with FakeTensorMode(), torch.no_grad():
        q, k, v, grad_out = (torch.empty(x.shape, dtype=torch.bfloat16) for x in case.tensors(torch.bfloat16))
        assert BACKEND.why_not(q, PLAIN) is None
        out, lse = BACKEND.forward(row := AttentionRow(q, k, v, case.spans, case.variant))
        kv_grads = torch.zeros_like(k), torch.zeros_like(v)
        dq = BACKEND.backward(row, RowGradient(grad_out, out, lse, kv_grads))
    assert (out.shape, lse.shape, lse.dtype) == (q.shape, (4, 9), torch.float32)
    assert dq.shape == q.shape


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", [*KNOWN, "long"])
def test_the_real_kernel(name: str, dtype: torch.dtype) -> None:
    case = reference.LONG if name == "long" else CASES[name]
    reference.check_on_gpu(BACKEND, MathBackend(), case, dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_real_kernel_on_a_stream_in_chunks() -> None:
    case = replace(reference.LONG, prefix=0, foreign=0)
    reference.check_on_gpu(BACKEND, MathBackend(), case, torch.bfloat16, chunk_size=256)
