"""Every attention backend of this machine against `math`: output, log-sum-exp and gradients, then rates.

The truth is `math` on the same numbers in fp64. A backend passes when its relative error stays within what
its dtype allows; nothing is timed that has not passed. Exit status 1 when one fails.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from chunkdist.attention import BACKENDS
from chunkdist.attention.base import AttentionRow, AttentionVariant, Backend, RowGradient, Span
from chunkdist.attention.math import MathBackend
from chunkdist.bench.options import parser_of
from chunkdist.bench.report import Run
from chunkdist.bench.timing import matmul_flops, median_s

LARGEST_ERROR = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
_OUTPUTS = ("out", "lse", "dq", "dk", "dv")
COLUMNS = (
    *("backend", "dtype", "case", "num_queries", "num_before", "out_error", "lse_error", "dq_error"),
    *("dk_error", "dv_error", "passed", "forward_flops", "backward_flops", "why_not"),
)
NOTE = "Errors are relative, of the norm, to `math` in fp64. Rates: 4 FLOPs a pair forward, 10 backward."


@dataclass(frozen=True, kw_only=True)
class Case:
    """A cell's attention: `num_queries` tokens after `num_before` of the prefix.

    Args:
        num_new: How many of the queries belong to another sequence, which begins after the first one.
    """

    case: str
    num_queries: int
    num_before: int = 0
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    window: int | None = None
    softcap: float | None = None
    num_new: int = 0

    @property
    def spans(self) -> tuple[Span, ...]:
        cut, num_keys = self.num_queries - self.num_new, self.num_before + self.num_queries
        first = Span(0, cut, 0, self.num_before + cut)
        return (first, Span(cut, self.num_queries, first.k_end, num_keys)) if self.num_new else (first,)

    @property
    def variant(self) -> AttentionVariant:
        return AttentionVariant(scale=self.head_dim**-0.5, window=self.window, softcap=self.softcap)


def cases(num_queries: int, num_before: int, **heads: Any) -> list[Case]:
    """For correctness: odd lengths, and what layers ask for beside causal attention."""
    odd = num_queries - 3
    few = {"num_heads": 8, **heads}
    return [
        Case(case="first chunk", num_queries=num_queries, **heads),
        Case(case="with a prefix", num_queries=num_queries, num_before=num_before, **heads),
        Case(case="odd lengths", num_queries=odd, num_before=num_before + 5, **heads),
        Case(case="head dim 64", num_queries=odd, num_before=num_before, head_dim=64, **heads),
        Case(case="head dim 256", num_queries=odd, num_before=num_before, head_dim=256, **few),
        Case(case="window", num_queries=odd, num_before=num_before, window=num_queries // 2, **heads),
        Case(case="soft-cap", num_queries=odd, num_before=num_before, softcap=20.0, **heads),
        Case(case="segments", num_queries=odd, num_before=num_before, num_new=num_queries // 3, **heads),
    ]


def errors(backend: Backend, case: Case, device: str, dtype: torch.dtype) -> dict[str, float]:
    """Relative errors, by the norm, of what `forward` returns, and of the gradients, which are added."""
    tensors = _inputs(case, device, dtype)
    exact = _run(MathBackend(), case, *(x.double() for x in tensors))
    found = _run(backend, case, *tensors)
    return {
        f"{name}_error": float((x.double() - truth).norm() / truth.norm())
        for name, x, truth in zip(_OUTPUTS, found, exact, strict=True)
    }


def _inputs(case: Case, device: str, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and the output's gradient."""
    generator = torch.Generator().manual_seed(0)
    queries = (case.num_queries, case.num_heads, case.head_dim)
    keys = (case.num_before + case.num_queries, case.num_kv_heads, case.head_dim)
    return [
        torch.randn(shape, generator=generator).to(device, dtype) for shape in (queries, keys, keys, queries)
    ]


def _run(backend: Backend, case: Case, q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor) -> list[Tensor]:
    row = AttentionRow(q, k, v, case.spans, case.variant)
    out, lse = backend.forward(row)
    before = torch.ones((), dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    kv_grads = before.expand(k.shape).clone(), before.expand(v.shape).clone()
    dq = backend.backward(row, RowGradient(grad_out, out, lse, kv_grads))
    return [out, lse, dq, *(grad - before for grad in kv_grads)]


def rates(
    backend: Backend, case: Case, device: str, dtype: torch.dtype, min_run_s: float
) -> dict[str, float]:
    """FLOP/s of the forward (4 per pair, head and unit of the head dim) and of the backward (10)."""
    q, k, v, grad_out = _inputs(case, device, dtype)
    row = AttentionRow(q, k, v, case.spans, case.variant)
    out, lse = backend.forward(row)
    kv_grads = torch.zeros_like(k, dtype=torch.float32), torch.zeros_like(v, dtype=torch.float32)
    forward_s = median_s(lambda: backend.forward(row), min_run_s=min_run_s)
    given = RowGradient(grad_out, out, lse, kv_grads)
    backward_s = median_s(lambda: backend.backward(row, given), min_run_s=min_run_s)
    pairs = case.num_queries * (case.num_before + (case.num_queries + 1) / 2) * case.num_heads * case.head_dim
    found = {"forward_s": forward_s, "backward_s": backward_s}
    return found | {"forward_flops": 4 * pairs / forward_s, "backward_flops": 10 * pairs / backward_s}


def measure(
    backends: Sequence[Backend], checked: list[Case], timed: list[Case], run: Run, dtypes: list[torch.dtype]
) -> bool:
    """Errors of every case that a backend takes, and rates of those that passed, in the first dtype; whether
    all have passed."""
    run.result |= {"matmul_flops": matmul_flops(run.device, dtypes[0])}
    min_run_s = 0.01 if run.options.smoke else 1.0
    for dtype in dtypes:
        for backend in backends:
            names = {"backend": backend.name, "dtype": str(dtype).removeprefix("torch.")}
            passed, reasons = True, set[str]()
            for case in checked:
                row: dict[str, Any] = {**names, **asdict(case)}
                q = torch.empty((1, 1, case.head_dim), device=run.device, dtype=dtype)
                if (why_not := backend.why_not(q, case.variant)) is None:
                    row |= errors(backend, case, run.device, dtype)
                    row["passed"] = all(row[f"{x}_error"] <= LARGEST_ERROR[dtype] for x in _OUTPUTS)
                    passed &= row["passed"]
                if why_not is None or why_not not in reasons:
                    run.add(**row, why_not=why_not)
                reasons.add(str(why_not))
            takes = [case for case in timed if backend.why_not(q, case.variant) is None]
            if isinstance(backend, MathBackend):
                takes = takes[:1]  # it is there to be right: long prefixes take it minutes
            for case in takes if passed and dtype == dtypes[0] else []:
                run.add(**names, **asdict(case), **rates(backend, case, run.device, dtype, min_run_s))
    return all(row.get("passed", True) for row in run.rows)


def main(arguments: Sequence[str]) -> int:
    """Runs the benchmark; returns the exit status."""
    names = ("device", "threads", "flash-impl")
    run = Run(parser_of("attention", "Attention backends against `math`.", *names), arguments)
    checked = cases(2048, 4096) if run.on_gpu else cases(48, 80)
    if run.on_gpu:  # long enough for heads to be taken in parts
        checked.append(Case(case="long prefix", num_queries=2048, num_before=40960))
    sizes = [(4096, 0), (4096, 28672), (4096, 126976)] if run.on_gpu else [(1024, 0), (1024, 3072)]
    few = {} if run.on_gpu else {"num_heads": 4, "num_kv_heads": 2, "head_dim": 64}
    if run.options.smoke:
        sizes = [(64, 64)]
    all_passed = measure(
        [backend for backend in BACKENDS if not (run.on_gpu and backend.name == "cpu_flash")],
        checked,
        [Case(case="rate", num_queries=t, num_before=before, **few) for t, before in sizes],
        run,
        [torch.bfloat16, torch.float16] if run.on_gpu else [torch.float32, torch.bfloat16],
    )
    run.end()
    return 0 if all_passed else 1
