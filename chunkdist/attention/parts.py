"""Attention of one row of a chunk over the parts that its queries see, merged by their log-sum-exps.

As in `prefix_and_diagonal`: each part's backward takes the merged output and log-sum-exp. Keys and values are
read as views of the store, each part's for itself.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from chunkdist.attention.base import AttentionRow, AttentionVariant, Backend, RowGradient
from chunkdist.attention.prefix_and_diagonal import merged as merge
from chunkdist.attention.visible import Part
from chunkdist.stores.kv_store import KVStore
from chunkdist.stream.stream import Chunk


def forward_parts(
    backend: Backend,
    q_TND: Tensor,
    store: KVStore,
    row: int,
    parts: Sequence[Part],
    variant: AttentionVariant,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, as `Backend.forward` returns them. The first part has all queries."""
    out_TND, lse_NT = backend.forward(_row_of(q_TND, store, row, parts[0], variant))
    if len(parts) == 1:
        return out_TND, lse_NT
    out_TND = out_TND.to(lse_NT.dtype, copy=True)
    for part in parts[1:]:
        other = backend.forward(_row_of(q_TND, store, row, part, variant))
        queries = part.queries
        out_TND[queries], lse_NT[:, queries] = merge(out_TND[queries], lse_NT[:, queries], *other)
    return out_TND.to(q_TND.dtype), lse_NT


def backward_parts(
    backend: Backend,
    q_TND: Tensor,
    store: KVStore,
    row: int,
    parts: Sequence[Part],
    variant: AttentionVariant,
    *,
    reader: Chunk,
    merged: tuple[Tensor, Tensor, Tensor],
) -> Tensor:
    """dq (T, N, D); the gradients of keys and values are left in the store.

    Args:
        reader: The chunk.
        merged: Gradient of the output and the output (T, N, D), and the log-sum-exp (N, T), of all parts
            together; the caller may have changed them (attention sinks).
    """
    grad_out_TND, out_TND, lse_NT = merged
    first = min(part.keys.start for part in parts)
    dq_TND = None
    with store.grads_from(reader, row, first) as kv_grads:
        for part in parts:
            queries, keys = part.queries, slice(part.keys.start - first, part.keys.end - first)
            dk_SKD, dv_SKD = (grads[keys] for grads in kv_grads)
            given = RowGradient(grad_out_TND[queries], out_TND[queries], lse_NT[:, queries], (dk_SKD, dv_SKD))
            dq = backend.backward(_row_of(q_TND, store, row, part, variant), given)
            if dq_TND is None:
                dq_TND = dq
            else:
                dq_TND[queries] += dq
    assert dq_TND is not None
    return dq_TND


def _row_of(q_TND: Tensor, store: KVStore, row: int, part: Part, variant: AttentionVariant) -> AttentionRow:
    keys_and_values = store.read(row, part.keys.start, part.keys.end)
    return AttentionRow(q_TND[part.queries], *keys_and_values, part.spans, variant, part.gap)
