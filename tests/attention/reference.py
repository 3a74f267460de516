"""Attention cases, dense attention in plain torch as their truth, and the ways a backend is run on them."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from chunkdist.attention.base import AttentionRow, AttentionVariant, RowGradient, Span

HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A chunk of several segments: the first has `prefix` keys before the chunk, and others `foreign`. With
    a `gap`, only the `prefix` is there, so many tokens before the one segment's first query."""

    lengths: tuple[int, ...]
    prefix: int = 0
    foreign: int = 0
    heads: tuple[int, int] = (4, 2)
    head_dim: int = 16
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    gap: int | None = None

    @property
    def variant(self) -> AttentionVariant:
        return AttentionVariant(scale=0.3, window=self.window, softcap=self.softcap)

    @property
    def spans(self) -> tuple[Span, ...]:
        if self.gap is not None:
            (length,) = self.lengths
            return (Span(0, length, self.foreign, self.foreign + self.prefix),)
        q_end, k_end, spans = 0, self.foreign, []
        for i, length in enumerate(self.lengths):
            q_start, k_start = q_end, k_end
            q_end, k_end = q_end + length, k_end + length + (self.prefix if i == 0 else 0)
            spans.append(Span(q_start, q_end, k_start, k_end))
        return tuple(spans)

    def tensors(
        self, dtype: torch.dtype, device: str = "cpu", seed: int = 0
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v and the output's gradient; q as a layer gives it (heads first in memory), k and v as views
        of a longer buffer."""
        generator = torch.Generator().manual_seed(seed)
        (num_heads, num_kv_heads), num_tokens, num_keys = self.heads, sum(self.lengths), self.spans[-1].k_end

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

        q = draw(num_heads, num_tokens, self.head_dim).transpose(0, 1)
        k, v = (draw(num_keys + 5, num_kv_heads, self.head_dim)[:num_keys] for _ in range(2))
        return q, k, v, draw(num_tokens, num_heads, self.head_dim)

    def sink(self, q: Tensor) -> Tensor:
        return torch.linspace(-1, 3, self.heads[0], dtype=accumulator(q), device=q.device)[:, None]


CASES = {
    "one segment": Case(lengths=(9,)),
    "prefix": Case(lengths=(7,), prefix=12),
    "one query": Case(lengths=(1,), prefix=6),
    "single queries": Case(lengths=(1, 1, 1), prefix=4, heads=(6, 2)),
    "segments": Case(lengths=(3, 1, 8, 2), prefix=10),
    "foreign keys": Case(lengths=(5, 4), prefix=3, foreign=6),
    "no sharing": Case(lengths=(5, 6), prefix=3, heads=(3, 3)),
    "one kv head": Case(lengths=(5, 6), prefix=3, heads=(4, 1), head_dim=8),
    "wide heads": Case(lengths=(4, 3), prefix=5, heads=(2, 1), head_dim=256),
    "window": Case(lengths=(9, 6), prefix=11, window=4),
    "window of one": Case(lengths=(5, 2), prefix=3, window=1),
    "window of the keys": Case(lengths=(4,), prefix=5, window=9),
    "window, long": Case(lengths=(6, 3), prefix=8, foreign=4, window=100),
    "window, foreign keys": Case(lengths=(3, 7), prefix=9, foreign=4, window=5),
    "window, one query": Case(lengths=(1,), prefix=9, window=3),
    "sinks": Case(lengths=(4, 5), prefix=6, sinks=True),
    "sinks, window": Case(lengths=(7, 2), prefix=6, window=5, sinks=True),
    "soft-cap": Case(lengths=(6, 5), prefix=7, softcap=1.5),
    "keys of an ancestor": Case(lengths=(7,), prefix=12, gap=0),
    "keys of an ancestor, foreign keys": Case(lengths=(13,), prefix=5, foreign=4, gap=9),
    "keys of an ancestor, one query": Case(lengths=(1,), prefix=6, gap=3, heads=(6, 2)),
    "keys of an ancestor, window": Case(lengths=(5,), prefix=12, gap=2, window=9),
    "keys of an ancestor, window that ends with the queries": Case(lengths=(5,), prefix=12, gap=2, window=8),
    "keys of an ancestor, long window": Case(lengths=(3,), prefix=6, foreign=2, gap=1, window=40),
    "keys of an ancestor, one key": Case(lengths=(4,), prefix=1, gap=0, window=5),
    "keys of an ancestor, soft-cap": Case(lengths=(6,), prefix=7, gap=4, softcap=1.5, window=11),
    "soft-cap, window, sinks": Case(lengths=(6, 5), prefix=7, window=4, softcap=1.5, sinks=True),
}

LONG = Case(lengths=(700, 300, 500), prefix=1300, foreign=100, heads=(8, 2), head_dim=128)
SEQUENCE = Case(lengths=(5, 19, 1, 8))  # no prefix: to be cut into chunks


def random_case(seed: int, *, softcap: bool = False) -> Case:
    draw = random.Random(seed)
    num_kv_heads = draw.choice([1, 2, 3])
    return Case(
        lengths=tuple(draw.randint(1, 12) for _ in range(draw.randint(1, 5))),
        prefix=draw.choice([0, draw.randint(1, 30)]),
        foreign=draw.choice([0, draw.randint(1, 9)]),
        heads=(num_kv_heads * draw.choice([1, 2, 4]), num_kv_heads),
        head_dim=draw.choice([8, 24, 40]),
        window=draw.choice([None, draw.randint(1, 40)]),
        softcap=draw.choice([None, 2.0]) if softcap else None,
        sinks=draw.random() < 0.3,
    )


def dense(case: Case, q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor) -> dict[str, Tensor]:
    """Softmax over a full matrix of scores, key by key as `Span` and `AttentionVariant` say, and autograd."""
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    visible = torch.zeros(q.shape[0], k.shape[0], dtype=torch.bool)
    for span in case.spans:
        for query in range(span.q_start, span.q_end):
            behind = query - span.q_end if case.gap is None else query - span.q_start + case.gap
            position = span.k_end + behind
            oldest = span.k_start if case.window is None else max(span.k_start, position - case.window + 1)
            visible[query, oldest : min(position + 1, span.k_end)] = True
    groups = case.heads[0] // case.heads[1]
    scores = torch.einsum("tnd,snd->nts", q, k.repeat_interleave(groups, 1)) * case.variant.scale
    if case.softcap is not None:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    scores = scores.masked_fill(~visible.to(scores.device), -torch.inf)
    if case.sinks:
        sink = case.sink(q).to(scores.dtype)[:, None].expand(-1, q.shape[0], -1)
        weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    out = torch.einsum("nts,snd->tnd", weights, v.repeat_interleave(groups, 1))
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), grad_out)
    return {"out": out.detach(), "lse": scores.detach().logsumexp(-1), "dq": dq, "dk": dk, "dv": dv}


def run(backend: Any, case: Case, q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor) -> dict[str, Tensor]:
    """The same by a backend; sinks as its caller adds them."""
    with torch.no_grad():
        out, lse = backend.forward(row := AttentionRow(q, k, v, case.spans, case.variant, case.gap))
        used_lse, used_out = lse, out
        if case.sinks:
            used_lse = torch.logaddexp(lse, case.sink(q))
            used_out = (out * torch.exp(lse - used_lse).T[..., None]).to(out.dtype)
        dk, dv = (torch.zeros_like(x, dtype=accumulator(q)) for x in (k, v))
        dq = backend.backward(row, RowGradient(grad_out, used_out, used_lse, (dk, dv)))
    return {"out": used_out, "lse": lse, "dq": dq, "dk": dk.to(k.dtype), "dv": dv.to(v.dtype)}


def run_in_chunks(
    backend: Any, case: Case, chunk_size: int, q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor
) -> dict[str, Tensor]:
    """A whole stream as the layer group runs it: chunks forwards, then backwards, gradients of K/V summed."""
    chunks = []
    for start in range(0, q.shape[0], chunk_size):
        tokens = slice(start, min(start + chunk_size, q.shape[0]))
        spans = tuple(
            Span(
                max(s.q_start, start) - start,
                min(s.q_end, tokens.stop) - start,
                s.k_start,
                min(s.k_end, tokens.stop),
            )
            for s in case.spans
            if s.q_end > start and s.q_start < tokens.stop
        )
        chunks.append((tokens, k[: tokens.stop], v[: tokens.stop], spans))
    out, dq = torch.empty_like(q), torch.empty_like(q)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=accumulator(q), device=q.device)
    dk, dv = (torch.zeros_like(x, dtype=accumulator(q)) for x in (k, v))
    with torch.no_grad():
        for tokens, keys, values, spans in chunks:
            row = AttentionRow(q[tokens], keys, values, spans, case.variant)
            out[tokens], lse[:, tokens] = backend.forward(row)
        for tokens, keys, values, spans in reversed(chunks):
            kv_grads = dk[: tokens.stop], dv[: tokens.stop]
            dq[tokens] = backend.backward(
                AttentionRow(q[tokens], keys, values, spans, case.variant),
                RowGradient(grad_out[tokens], out[tokens], lse[:, tokens], kv_grads),
            )
    return {"out": out, "lse": lse, "dq": dq, "dk": dk.to(k.dtype), "dv": dv.to(v.dtype)}


def check_on_gpu(
    backend: Any, math: Any, case: Case, dtype: torch.dtype, chunk_size: int | None = None
) -> None:
    """A real kernel against the math backend in fp64, beside plain dense attention; without a device sync."""
    tensors = case.tensors(dtype, "cuda")
    if (reason := backend.why_not(tensors[0], case.variant)) is not None:
        pytest.skip(reason)

    def attend(backend: Any, *tensors: Tensor) -> dict[str, Tensor]:
        if chunk_size is None:
            return run(backend, case, *tensors)
        return run_in_chunks(backend, case, chunk_size, *tensors)

    attend(backend, *tensors)
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = attend(backend, *tensors)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_no_worse(got, attend(math, *(x.double() for x in tensors)), dense(case, *tensors))


def assert_exact(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, tensor in expected.items():
        assert got[name].shape == tensor.shape, name
        torch.testing.assert_close(got[name], tensor, rtol=1e-12, atol=1e-12, msg=f"{name}: {{}}".format)


def assert_no_worse(got: dict[str, Tensor], truth: dict[str, Tensor], plain: dict[str, Tensor]) -> None:
    """Not further from the fp64 truth than the plain way in the same dtype, at the worst element of each
    tensor, give or take a rounding step of the largest one (1e-5 where all are 0)."""
    for name, expected in truth.items():
        error, plain_error = ((x[name].double() - expected).abs().max() for x in (got, plain))
        step = (torch.finfo(got["out"].dtype).eps * expected.abs().max()).clamp(min=1e-5)
        assert error <= plain_error + step, f"{name}: {error:.2e}, the plain way {plain_error:.2e}"


def accumulator(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
