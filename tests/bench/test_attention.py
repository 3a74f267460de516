"""The attention benchmark tells a wrong backend from a right one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from chunkdist.attention.cpu_flash import CpuFlashBackend
from chunkdist.bench import attention
from chunkdist.bench.attention import Case


def test_smoke(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "cases", lambda *sizes: CASES)
    file = tmp_path / "attention.json"
    assert attention.main(["--smoke", "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    rows = {(row["backend"], row["dtype"], row["name"]): row for row in result["rows"]}
    for dtype in ("float32", "bfloat16"):
        assert rows["cpu_flash", dtype, "prefix"]["passed"]
        assert "window" in rows["cpu_flash", dtype, "window"]["why_not"]
        assert rows["math", dtype, "window"]["passed"]
    assert {row["backend"] for row in result["rates"]} == {"cpu_flash", "math"}
    assert "varlen" in capsys.readouterr().out


CASES = [
    Case(name="prefix", num_queries=13, num_before=7, num_heads=4, num_kv_heads=2, head_dim=8),
    Case(name="segments", num_queries=13, num_before=7, num_heads=2, num_kv_heads=2, num_segments=3),
    Case(name="window", num_queries=13, num_before=7, num_heads=2, num_kv_heads=2, window=4),
]


@pytest.mark.parametrize("fault", ["one key less", "gradients not added", "gradient too small"])
def test_a_wrong_backend_fails_and_is_not_timed(fault: str) -> None:
    class Wrong(CpuFlashBackend):
        def forward(self, q: Any, k: Any, v: Any, *rest: Any) -> Any:
            return super().forward(q, k, torch.cat([v[:-1], v[-1:] * 0]) if "key" in fault else v, *rest)

        def backward(self, *args: Any) -> Any:
            if fault == "gradients not added":
                for grad in args[6]:
                    grad.zero_()
            dq = super().backward(*args)
            return dq * 0.98 if fault == "gradient too small" else dq

    result = attention.measure(
        [Wrong()],
        CASES[:2],
        CASES[:1],
        device="cpu",
        dtypes=[torch.bfloat16],
        num_calls=1,
        write=lambda found: None,
    )
    assert not result["passed"]
    assert result["rates"] == []


def test_pairs_are_counted_with_window_and_segments() -> None:
    assert Case(name="", num_queries=4, num_before=2).num_pairs() == 3 + 4 + 5 + 6
    assert Case(name="", num_queries=4, num_before=2, window=4).num_pairs() == 3 + 4 + 4 + 4
    assert Case(name="", num_queries=5, num_before=2, num_segments=2).num_pairs() == 3 + 4 + 1 + 2 + 3
