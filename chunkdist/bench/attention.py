"""Every attention backend of this machine against `math`: output, log-sum-exp and gradients, then rates.

The truth is `math` on the same numbers in fp64. A backend passes when its relative error stays within what
its dtype allows; nothing is timed that has not passed. Exit status 1 when one fails.

    python -m chunkdist.bench.attention [--smoke] [--json FILE] [--repetitions N] [--device cuda]
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from chunkdist.attention import BACKENDS
from chunkdist.attention.base import AttentionVariant, Backend, Span
from chunkdist.attention.math import MathBackend
from chunkdist.bench.environment import provenance, write_partial, write_result
from chunkdist.bench.options import parsed, parser_of
from chunkdist.bench.timing import matmul_flops, median_s

LARGEST_ERROR = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A cell's attention: `num_queries` tokens after `num_before` of the prefix, in `num_segments` parts."""

    name: str
    num_queries: int
    num_before: int = 0
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    window: int | None = None
    softcap: float | None = None
    num_segments: int = 1

    def spans(self) -> tuple[Span, ...]:
        """Segments of equal length in the chunk; the first one has the prefix."""
        length = self.num_queries // self.num_segments
        ends = [*(length * number for number in range(1, self.num_segments)), self.num_queries]
        starts = [0, *ends[:-1]]
        return tuple(
            Span(start, end, start + self.num_before if start else 0, end + self.num_before)
            for start, end in zip(starts, ends, strict=True)
        )

    def variant(self) -> AttentionVariant:
        return AttentionVariant(scale=self.head_dim**-0.5, window=self.window, softcap=self.softcap)

    def num_pairs(self) -> int:
        """Pairs (query, key) that see each other."""
        total = 0
        for span in self.spans():
            before = span.k_end - span.k_start - (span.q_end - span.q_start)
            for query in range(span.q_end - span.q_start):
                total += min(before + query + 1, self.window or before + query + 1)
        return total


def cases(num_queries: int, num_before: int) -> list[Case]:
    """For correctness: odd lengths, and what layers ask for beside causal attention."""
    odd = num_queries - 3
    return [
        Case(name="first chunk", num_queries=num_queries),
        Case(name="with a prefix", num_queries=num_queries, num_before=num_before),
        Case(name="odd lengths", num_queries=odd, num_before=num_before + 5),
        Case(name="as many kv heads", num_queries=odd, num_before=num_before, num_heads=8),
        Case(name="head dim 64", num_queries=odd, num_before=num_before, head_dim=64),
        Case(name="head dim 256", num_queries=odd, num_before=num_before, num_heads=8, head_dim=256),
        Case(name="three segments", num_queries=odd, num_before=num_before, num_segments=3),
        Case(name="window", num_queries=odd, num_before=num_before, window=num_queries // 2),
        Case(name="soft-cap", num_queries=odd, num_before=num_before, softcap=20.0),
    ]


def errors(backend: Backend, case: Case, device: str, dtype: torch.dtype) -> dict[str, float]:
    """Relative errors, of the norm: of what `forward` returns, and of the gradients, which are added to what
    was there."""
    tensors = _inputs(case, device, dtype)
    exact = _run(MathBackend(), case, *(x.double() for x in tensors))
    found = _run(backend, case, *tensors)
    names = ("out", "lse", "dq", "dk", "dv")
    return {
        name: float((x.double() - truth).norm() / truth.norm())
        for name, x, truth in zip(names, found, exact, strict=True)
    }


def _inputs(case: Case, device: str, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and the output's gradient."""
    generator = torch.Generator().manual_seed(0)
    num_keys = case.num_before + case.num_queries
    queries = (case.num_queries, case.num_heads, case.head_dim)
    keys = (num_keys, case.num_kv_heads, case.head_dim)
    return [
        torch.randn(shape, generator=generator).to(device, dtype) for shape in (queries, keys, keys, queries)
    ]


def _run(backend: Backend, case: Case, q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor) -> list[Tensor]:
    spans, variant = case.spans(), case.variant()
    out, lse = backend.forward(q, k, v, spans, variant)
    wide = torch.promote_types(q.dtype, torch.float32)
    before = torch.ones((), dtype=wide, device=q.device)
    kv_grads = before.expand(k.shape).clone(), before.expand(v.shape).clone()
    dq = backend.backward(grad_out, q, k, v, out, lse, kv_grads, spans, variant)
    return [out, lse, dq, *(grad - before for grad in kv_grads)]


def rates(backend: Backend, case: Case, device: str, dtype: torch.dtype, num_calls: int) -> dict[str, float]:
    """FLOP/s of the forward (4 per pair, head and unit of the head dim) and of the backward (10)."""
    q, k, v, grad_out = _inputs(case, device, dtype)
    spans, variant, on_gpu = case.spans(), case.variant(), q.is_cuda
    out, lse = backend.forward(q, k, v, spans, variant)
    kv_grads = torch.zeros_like(k, dtype=torch.float32), torch.zeros_like(v, dtype=torch.float32)
    forward_s = median_s(lambda: backend.forward(q, k, v, spans, variant), on_gpu=on_gpu, num_calls=num_calls)
    backward_s = median_s(
        lambda: backend.backward(grad_out, q, k, v, out, lse, kv_grads, spans, variant),
        on_gpu=on_gpu,
        num_calls=num_calls,
    )
    pairs = case.num_pairs() * case.num_heads * case.head_dim
    return {
        "forward_s": forward_s,
        "backward_s": backward_s,
        "forward_flops": 4 * pairs / forward_s,
        "backward_flops": 10 * pairs / backward_s,
    }


def measure(
    backends: Sequence[Backend],
    checked: Sequence[Case],
    timed: Sequence[Case],
    *,
    device: str,
    dtypes: Sequence[torch.dtype],
    num_calls: int,
    write: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """What the JSON holds: errors of every case that a backend takes, and rates of those that passed.

    `write` is called after each case and each rate, with what there is so far.
    """
    rows: list[dict[str, Any]] = []
    fast: list[dict[str, Any]] = []
    result = {"passed": True, "rows": rows, "rates": fast, "matmul_flops": matmul_flops(device, dtypes[0])}
    for dtype in dtypes:
        name = str(dtype).removeprefix("torch.")
        for backend in backends:
            passed = True
            for case in checked:
                q = torch.empty((1, 1, case.head_dim), device=device, dtype=dtype)
                why_not = backend.why_not(q, case.variant())
                row: dict[str, Any] = {"backend": backend.name, "dtype": name, **asdict(case)}
                if why_not is None:
                    row["errors"] = errors(backend, case, device, dtype)
                    row["passed"] = all(error <= LARGEST_ERROR[dtype] for error in row["errors"].values())
                    passed &= row["passed"]
                else:
                    row["why_not"] = why_not
                rows.append(row)
                result["passed"] &= row.get("passed", True)
                write(result)
            takes = [case for case in timed if backend.why_not(q, case.variant()) is None]
            if isinstance(backend, MathBackend):
                takes = takes[:1]  # it is there to be right: long prefixes take it minutes
            for case in takes if passed and dtype == dtypes[0] else []:
                found = rates(backend, case, device, dtype, num_calls)
                fast.append({"backend": backend.name, "dtype": name, **asdict(case), **found})
                write(result)
    return result


def table(result: dict[str, Any]) -> str:
    """Errors, then rates, for people to read."""
    lines = [f"{'relative errors':42}{'out':>9}{'lse':>9}{'dq':>9}{'dk':>9}{'dv':>9}"]
    reason = None
    for row in result["rows"]:
        name = f"{row['backend']:11} {row['dtype']:9} {row['name']:20}"
        if "errors" in row:
            verdict = "" if row["passed"] else "  FAILED"
            lines.append(name + "".join(f"{error:9.1e}" for error in row["errors"].values()) + verdict)
        elif reason != (reason := (row["backend"], row["dtype"], row["why_not"])):
            lines.append(f"{name} not: {row['why_not']}")
    lines += ["", f"{'TFLOP/s':22}{'queries':>9}{'prefix':>9}{'forward':>10}{'backward':>10}"]
    for row in result["rates"]:
        speeds = "".join(f"{row[f'{way}_flops'] / 1e12:10.4g}" for way in ("forward", "backward"))
        lines.append(f"{row['backend']:22}{row['num_queries']:9,}{row['num_before']:9,}{speeds}")
    return "\n".join([*lines, f"{'a large matrix product':40}{result['matmul_flops'] / 1e12:10.4g}"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = parser_of(
        *("attention", "Attention backends against `math`."),
        *("repetitions", "device", "threads", "flash-impl"),
        num_rounds=(10, 1),
    )
    options = parsed(parser, given)
    on_gpu = torch.device(options.device).type == "cuda"
    checked = cases(2048, 4096) if on_gpu else cases(48, 80)
    if on_gpu:  # long enough for heads to be taken in parts
        checked.append(Case(name="long prefix", num_queries=2048, num_before=40960))
    sizes = [(4096, 0), (4096, 28672), (4096, 126976)] if on_gpu else [(1024, 0), (1024, 3072)]
    few = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 64} if options.smoke or not on_gpu else {}
    if options.smoke:
        sizes = [(64, 64)]
    timed = [Case(name="rate", num_queries=t, num_before=before, **few) for t, before in sizes]
    head = {
        **provenance("attention", given, device=options.device),
        "num_repetitions": options.repetitions,
    }
    found = measure(
        [backend for backend in BACKENDS if not (on_gpu and backend.name == "cpu_flash")],
        checked,
        timed,
        device=options.device,
        dtypes=(torch.bfloat16, torch.float16) if on_gpu else (torch.float32, torch.bfloat16),
        num_calls=options.repetitions,
        write=lambda found: write_partial({**head, **found}, options.json),
    )
    result = {**head, **found}
    print(table(result))
    write_result(result, options.json)
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
