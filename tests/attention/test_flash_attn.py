from __future__ import annotations

import inspect
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from chunkdist.attention import varlen
from chunkdist.attention.base import AttentionVariant
from chunkdist.attention.flash_attn import FlashAttnBackend
from chunkdist.attention.math import MathBackend
from tests.attention import reference, standins
from tests.attention.reference import CASES, HALF, assert_exact, assert_no_worse, dense, run
from tests.attention.standins import FlashKernel

BACKEND = FlashAttnBackend()
CAPPED = AttentionVariant(scale=1.0, softcap=30.0)


@pytest.mark.parametrize("name", CASES)
def test_equal_to_dense_attention(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    standins.flash_attn_in_place(monkeypatch, FlashKernel((torch.float64,)))
    tensors = CASES[name].tensors(torch.float64)
    assert_exact(run(BACKEND, CASES[name], *tensors), dense(CASES[name], *tensors))


@pytest.mark.parametrize("seed", range(20))
def test_equal_to_dense_attention_for_random_spans(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    standins.flash_attn_in_place(monkeypatch, FlashKernel((torch.float64,)))
    case = reference.random_case(seed, softcap=True)
    tensors = case.tensors(torch.float64, seed=seed)
    assert_exact(run(BACKEND, case, *tensors), dense(case, *tensors))


@pytest.mark.parametrize(
    ("kernel", "name"),
    [
        (standins.TopLeftKernel, "prefix"),
        (standins.TopLeftKernel, "segments"),
        (standins.WideWindowKernel, "window"),
        (standins.NarrowWindowKernel, "window"),
        (standins.DeafKernel, "sinks"),
        (standins.StraightKernel, "soft-cap"),
    ],
)
def test_a_kernel_with_another_convention_is_found(
    kernel: type[FlashKernel], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    standins.flash_attn_in_place(monkeypatch, kernel((torch.float64,)))
    tensors = CASES[name].tensors(torch.float64)
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        assert_exact(run(BACKEND, CASES[name], *tensors), dense(CASES[name], *tensors))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", ["segments", "window, foreign keys", "soft-cap, window, sinks"])
def test_half_precision(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    standins.flash_attn_in_place(monkeypatch, FlashKernel())
    case = CASES[name]
    tensors = case.tensors(dtype)
    got = run(BACKEND, case, *tensors)
    assert got["lse"].dtype == torch.float32
    assert all(got[key].dtype == dtype for key in ("out", "dq", "dk", "dv"))
    assert_no_worse(got, dense(case, *(x.double() for x in tensors)), dense(case, *tensors))


def test_heads_are_taken_in_parts_where_scratch_space_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = FlashKernel((torch.float64,))
    standins.flash_attn_in_place(monkeypatch, kernel)
    tensors = CASES["segments"].tensors(torch.float64)
    whole = run(BACKEND, CASES["segments"], *tensors)
    kernel.keys_seen.clear()
    monkeypatch.setattr(varlen, "SCRATCH_BYTES", 1)
    assert_exact(run(BACKEND, CASES["segments"], *tensors), whole)
    assert [keys.shape[1] for keys in kernel.keys_seen] == [2, 1, 1]


def test_the_prefix_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = FlashKernel((torch.float64,))
    standins.flash_attn_in_place(monkeypatch, kernel)
    tensors = CASES["segments"].tensors(torch.float64)
    run(BACKEND, CASES["segments"], *tensors)
    assert [keys.data_ptr() for keys in kernel.keys_seen] == [tensors[1].data_ptr()] * 2


@pytest.mark.parametrize(
    ("asked", "warn_only", "expected"), [(False, False, False), (True, True, False), (True, False, True)]
)
def test_deterministic_when_torch_is(
    asked: bool, warn_only: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = FlashKernel((torch.float64,))
    standins.flash_attn_in_place(monkeypatch, kernel)
    torch.use_deterministic_algorithms(asked, warn_only=warn_only)
    try:
        run(BACKEND, CASES["prefix"], *CASES["prefix"].tensors(torch.float64))
    finally:
        torch.use_deterministic_algorithms(False)
    assert kernel.deterministic is expected


def test_why_not() -> None:
    assert "the tensors are on cpu" in str(
        BACKEND.why_not(torch.empty(2, 2, 64, dtype=torch.bfloat16), CAPPED)
    )
    assert "float16 and bfloat16" in str(BACKEND.why_not(torch.empty(2, 2, 64), CAPPED))


def why_not_fake() -> str | None:
    with FakeTensorMode():
        return BACKEND.why_not(torch.empty(2, 2, 64, dtype=torch.bfloat16), CAPPED)


def test_why_not_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    for path in ("flash_attn", "flash_attn.flash_attn_interface"):
        monkeypatch.delitem(sys.modules, path, raising=False)
    monkeypatch.setattr(sys, "meta_path", [NotInstalled(), *sys.meta_path])
    assert why_not_fake().startswith("the flash-attn package is not installed: pip install")


class NotInstalled:
    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "flash_attn":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


@pytest.mark.parametrize(
    ("version", "fits"),
    [("2.6.3", False), ("2.7.0.post2", True), ("2.8.3", True), ("3.0.0b1", False), ("1.0", False)],
)
def test_why_not_by_version(version: str, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    standins.flash_attn_in_place(monkeypatch, FlashKernel(), version)
    assert why_not_fake() is None if fits else f"{version} is installed" in str(why_not_fake())


def test_why_not_with_a_package_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    standins.flash_attn_in_place(monkeypatch, FlashKernel())
    monkeypatch.setitem(
        sys.modules, "flash_attn.flash_attn_interface", None
    )  # importing it is an ImportError
    assert "does not load with torch" in str(why_not_fake())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", [*CASES, "long"])
def test_the_real_kernel(name: str, dtype: torch.dtype) -> None:
    pytest.importorskip("flash_attn")
    case = reference.LONG if name == "long" else CASES[name]
    reference.check_on_gpu(BACKEND, MathBackend(), case, dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_stand_ins_have_the_packages_signatures(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("flash_attn.flash_attn_interface")
    stand_in = standins.flash_attn_in_place(monkeypatch, FlashKernel())
    for name in ("_flash_attn_varlen_forward", "_flash_attn_varlen_backward"):
        known = list(inspect.signature(getattr(stand_in, name)).parameters)
        there = [argument.name for argument in getattr(torch.ops.flash_attn, name).default._schema.arguments]
        assert (
            there[: len(known)] == known
        )  # 2.7.4 and later have zero_tensors at the end, which nothing here passes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("variant", [{}, {"window": 100}, {"softcap": 2.0}, {"window": 100, "softcap": 2.0}])
def test_the_real_kernel_on_a_stream_in_chunks(variant: dict[str, Any]) -> None:
    pytest.importorskip("flash_attn")
    case = replace(reference.LONG, prefix=0, foreign=0, **variant)
    reference.check_on_gpu(BACKEND, MathBackend(), case, torch.bfloat16, chunk_size=256)
