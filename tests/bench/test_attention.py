"""The attention benchmark tells a wrong backend from a right one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from chunkdist.attention.base import AttentionRow, RowGradient
from chunkdist.attention.cpu_flash import CpuFlashBackend
from chunkdist.bench import attention
from chunkdist.bench.attention import Case
from chunkdist.bench.options import parser_of
from chunkdist.bench.report import Run

CASES = [
    Case(case="prefix", num_queries=13, num_before=7, num_heads=4, num_kv_heads=2, head_dim=8),
    Case(case="first", num_queries=13, num_heads=2, num_kv_heads=2, head_dim=8),
]


@pytest.mark.parametrize("fault", ["one key less", "gradients not added", "gradient too small"])
def test_a_wrong_backend_fails_and_is_not_timed(fault: str) -> None:
    class Wrong(CpuFlashBackend):
        def forward(self, row: AttentionRow) -> Any:
            less = torch.cat([row.v_SKD[:-1], row.v_SKD[-1:] * 0])
            return super().forward(replace(row, v_SKD=less) if "key" in fault else row)

        def backward(self, row: AttentionRow, given: RowGradient) -> Any:
            if fault == "gradients not added":
                for grad in given.kv_grads:
                    grad.zero_()
            dq = super().backward(row, given)
            return dq * 0.98 if fault == "gradient too small" else dq

    run = Run(parser_of("attention", ""), ["--smoke"])
    assert not attention.measure([Wrong()], CASES, CASES[:1], run, [torch.bfloat16])
    assert not any("forward_flops" in row for row in run.rows)


def test_the_exit_status_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    for passed, status in ((True, 0), (False, 1)):
        monkeypatch.setattr(attention, "measure", lambda *args, passed=passed: passed)
        assert attention.main(["--smoke"]) == status
