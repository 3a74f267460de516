"""`math`: flash attention in plain torch, tile by tile (arXiv 2205.14135, algorithms 1 and 4).

Any dtype, any device, every variant: the truth for the other backends. Sums are in fp32, or fp64 for fp64
inputs. The largest intermediate is one tile of scores, whatever the lengths.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from chunkdist.attention.base import AttentionRow, AttentionVariant, RowGradient

TILE_TOKENS = 512


class MathBackend:
    name = "math"
    equal_head_dims = False

    def why_not(self, q: Tensor, variant: AttentionVariant) -> str | None:
        return None

    def forward(self, row: AttentionRow) -> tuple[Tensor, Tensor]:
        q_TND, k_SKD, v_SKD = row.qkv
        variant = row.variant
        num_tokens, num_heads, _ = q_TND.shape
        dtype = _sum_dtype(q_TND)
        out_NTD = q_TND.new_zeros((num_heads, num_tokens, v_SKD.shape[-1]), dtype=dtype)
        lse_NT = q_TND.new_full((num_heads, num_tokens), -torch.inf, dtype=dtype)
        for q_tile, k_tile, offset in _tiles(row):
            q_KGtD = _by_kv_head(q_TND[q_tile], k_SKD.shape[1]).to(dtype)
            scores_KGts = _scores(q_KGtD, k_SKD[k_tile].to(dtype), offset, variant)[0]
            tile_lse = scores_KGts.logsumexp(-1)
            tile_out = (
                torch.exp(scores_KGts - _finite(tile_lse)[..., None])
                @ v_SKD[k_tile].to(dtype).transpose(0, 1)[:, None]
            )
            tile_lse, tile_out = tile_lse.flatten(0, 1), tile_out.flatten(0, 1)
            lse = torch.logaddexp(lse_NT[:, q_tile], tile_lse)
            kept, added = (
                torch.exp(part - _finite(lse))[..., None] for part in (lse_NT[:, q_tile], tile_lse)
            )
            out_NTD[:, q_tile] = out_NTD[:, q_tile] * kept + tile_out * added
            lse_NT[:, q_tile] = lse
        return out_NTD.transpose(0, 1).to(q_TND.dtype), lse_NT

    def backward(self, row: AttentionRow, given: RowGradient) -> Tensor:
        q_TND, k_SKD, v_SKD = row.qkv
        grad_out_TND, lse_NT, variant = given.grad_out_TND, given.lse_NT, row.variant
        dtype = _sum_dtype(q_TND)
        num_kv_heads = k_SKD.shape[1]
        dk_SKD, dv_SKD = given.kv_grads
        dq_TND = torch.zeros_like(q_TND, dtype=dtype)
        row_dot_TN = (grad_out_TND.to(dtype) * given.out_TND.to(dtype)).sum(-1)
        for q_tile, k_tile, offset in _tiles(row):
            q_KGtD = _by_kv_head(q_TND[q_tile], num_kv_heads).to(dtype)
            do_KGtD = _by_kv_head(grad_out_TND[q_tile], num_kv_heads).to(dtype)
            k_K1sD = k_SKD[k_tile].to(dtype).transpose(0, 1)[:, None]
            v_K1sD = v_SKD[k_tile].to(dtype).transpose(0, 1)[:, None]
            scores_KGts, cap_slope = _scores(q_KGtD, k_SKD[k_tile].to(dtype), offset, variant)
            lse_KGt1 = lse_NT[:, q_tile].to(dtype).unflatten(0, (num_kv_heads, -1))[..., None]
            weights_KGts = torch.exp(scores_KGts - lse_KGt1)
            dv_SKD[k_tile] += (weights_KGts.transpose(-1, -2) @ do_KGtD).sum(1).transpose(0, 1)
            row_dot_KGt1 = row_dot_TN[q_tile].T.unflatten(0, (num_kv_heads, -1))[..., None]
            dscores = weights_KGts * (do_KGtD @ v_K1sD.transpose(-1, -2) - row_dot_KGt1) * variant.scale
            if cap_slope is not None:
                dscores = dscores * cap_slope
            dq_TND[q_tile] += (dscores @ k_K1sD).flatten(0, 1).transpose(0, 1)
            dk_SKD[k_tile] += (dscores.transpose(-1, -2) @ q_KGtD).sum(1).transpose(0, 1)
        return dq_TND.to(q_TND.dtype)


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _finite(lse: Tensor) -> Tensor:
    """A row that has seen no key yet has log-sum-exp -inf, and exp(-inf - -inf) is nan: there, weights are
    0."""
    return lse.masked_fill(lse == -torch.inf, 0)


def _by_kv_head(x_TND: Tensor, num_kv_heads: int) -> Tensor:
    """(T, N, D) to (K, G, T, D), G query heads a kv head."""
    heads: Tensor = x_TND.transpose(0, 1).unflatten(0, (num_kv_heads, -1))
    return heads


def _tiles(row: AttentionRow) -> Iterator[tuple[slice, slice, int]]:
    """The tiles with at least one visible key: queries, keys, and the key position of the first query in the
    tile's keys."""
    window = row.variant.window
    for span in row.spans:
        first_key = row.first_query_at(span) - span.q_start  # of query 0, in the coordinates of k
        for q_start in range(span.q_start, span.q_end, TILE_TOKENS):
            q_end = min(q_start + TILE_TOKENS, span.q_end)
            oldest = span.k_start if window is None else max(span.k_start, first_key + q_start - window + 1)
            newest = min(first_key + q_end, span.k_end)
            for k_start in range(oldest, newest, TILE_TOKENS):
                k_end = min(k_start + TILE_TOKENS, newest)
                yield slice(q_start, q_end), slice(k_start, k_end), first_key + q_start - k_start


def _scores(
    q_KGtD: Tensor, k_sKD: Tensor, offset: int, variant: AttentionVariant
) -> tuple[Tensor, Tensor | None]:
    """Scaled, capped scores of a tile, -inf where a query does not see a key, and the slope of the cap."""
    scores = q_KGtD @ k_sKD.permute(1, 2, 0)[:, None] * variant.scale
    slope = None
    if variant.softcap is not None:
        capped = torch.tanh(scores / variant.softcap)
        scores, slope = capped * variant.softcap, 1 - capped * capped
    num_queries, num_keys = scores.shape[-2:]
    hides_newer = offset < num_keys - 1
    hides_older = variant.window is not None and offset + num_queries - 1 >= variant.window
    if hides_newer or hides_older:
        distance = torch.arange(offset, offset + num_queries, device=scores.device)[:, None] - torch.arange(
            num_keys, device=scores.device
        )
        hidden = distance < 0
        if variant.window is not None:
            hidden = hidden | (distance >= variant.window)
        scores = scores.masked_fill(hidden, -torch.inf)
    return scores, slope
