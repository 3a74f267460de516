"""The CPU kernel in two parts, with keys cut for an even load, against dense attention."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from chunkdist.attention import cpu_flash
from chunkdist.attention.cpu_flash import CpuFlashBackend
from tests.attention import reference
from tests.attention.reference import CASES, assert_exact, dense, run, run_in_chunks

BACKEND = CpuFlashBackend()
KNOWN = {
    name: case for name, case in CASES.items() if BACKEND.why_not(torch.empty(1, 1, 8), case.variant) is None
}


@pytest.fixture(params=[1, 2, 3])
def num_threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """So many threads, and cuts at any length."""
    monkeypatch.setattr(cpu_flash, "MIN_KEYS", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", KNOWN)
def test_equal_to_dense_attention(name: str, num_threads: int) -> None:
    tensors = KNOWN[name].tensors(torch.float64)
    assert_exact(run(BACKEND, KNOWN[name], *tensors), dense(KNOWN[name], *tensors))


@pytest.mark.parametrize("chunk_size", [1, 4, 8, 100])
def test_a_stream_in_chunks_is_the_whole_stream(chunk_size: int, num_threads: int) -> None:
    case = replace(reference.SEQUENCE, heads=(5, 5))
    tensors = case.tensors(torch.float64)
    assert_exact(run_in_chunks(BACKEND, case, chunk_size, *tensors), dense(case, *tensors))


@pytest.mark.parametrize(
    ("threads", "num_heads", "num_keys", "expected"),
    [
        (1, 5, 4096, 1),
        (2, 4, 4096, 1),
        (2, 5, 4096, 2),
        (2, 5, 4097, 1),  # cannot be halved
        (2, 5, 300, 1),  # too short to be worth it
        (16, 40, 4096, 2),
        (64, 40, 4096, 8),
    ],
)
def test_keys_are_cut_until_all_threads_have_work(
    threads: int, num_heads: int, num_keys: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert cpu_flash._even_cuts(num_heads, num_keys) == expected
