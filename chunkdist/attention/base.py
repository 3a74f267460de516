"""What an attention backend is: two pure functions over one row (batch element) of a cell.

Shape letters: T tokens of the chunk, S of the keys it sees, N query heads, K kv heads, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class AttentionVariant:
    """What a layer asks for beside causal attention.

    Args:
        scale: Factor of the scores.
        window: Number of tokens a query sees, itself included; `None`: all before it.
        softcap: Scores become `softcap * tanh(scores / softcap)`; `None`: as they are.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None


@dataclass(frozen=True)
class Span:
    """The part of a cell that belongs to one segment.

    Queries [q_start, q_end) of the chunk see keys [k_start, k_end) of the K view, causally, the last query
    aligned with the last key. The spans of a row are ascending and adjacent, in the queries and in the keys.
    """

    q_start: int
    q_end: int
    k_start: int
    k_end: int


@dataclass(frozen=True)
class AttentionRow:
    """One row of a cell: what a kernel attends from and to.

    Args:
        q_TND: Queries of the chunk (T, N, D).
        k_SKD, v_SKD: Keys and values that any of them sees (S, K, D).
        gap: Where keys are those of an earlier part of the queries' sequence, in one span: how many of its
            tokens lie between the last key and the first query. All are seen that the window shows, and each
            query sees one. `None`: the last query of a span is aligned with its last key.
    """

    q_TND: Tensor
    k_SKD: Tensor
    v_SKD: Tensor
    spans: tuple[Span, ...]
    variant: AttentionVariant
    gap: int | None = None

    def first_query_at(self, span: Span) -> int:
        """Where the span's first query is, in the coordinates of the keys."""
        return span.k_end - (span.q_end - span.q_start) if self.gap is None else span.k_end + self.gap

    @property
    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q_TND, self.k_SKD, self.v_SKD


@dataclass(frozen=True)
class RowGradient:
    """What the backward of a row starts from.

    Args:
        grad_out_TND: Gradient of the output (T, N, D).
        out_TND, lse_NT: The output (T, N, D) and the log-sum-exp (N, T) from which the gradients follow; the
            caller may have changed them (attention sinks).
        kv_grads: Gradients of K and V (S, K, D), of any dtype, to which those of this row are added.
    """

    grad_out_TND: Tensor
    out_TND: Tensor
    lse_NT: Tensor
    kv_grads: tuple[Tensor, Tensor]


class Backend(Protocol):
    """An attention kernel with its backward. Calls run without autograd; no mask is built, K and V are not
    copied."""

    name: str
    equal_head_dims: bool  # V must be as wide as Q and K: the caller pads it with zeros

    def why_not(self, q: Tensor, variant: AttentionVariant) -> str | None:
        """`None` when this backend can do it, else the reason in a few words. Reads metadata of `q` only."""
        ...

    def forward(self, row: AttentionRow) -> tuple[Tensor, Tensor]:
        """Returns the output (T, N, D) in q's dtype, and the log-sum-exp (N, T) of the scaled, capped
        scores."""
        ...

    def backward(self, row: AttentionRow, given: RowGradient) -> Tensor:
        """Returns dq (T, N, D), and adds the gradients of K and V to `given.kv_grads`."""
        ...
