"""Tensors inside of what a hook gets and returns, cut along their tokens and put together again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def token_dims(parts: list[tuple[int, list[Any]]], place: int) -> int | None:
    """The dim of one of the tensors that runs along the tokens; `None`: there is none."""
    tensors = [tensors_of(inputs)[place] for _, inputs in parts if place < len(tensors_of(inputs))]
    if len({x.ndim for x in tensors}) != 1:
        return None
    dims = range(tensors[0].ndim)
    along = [d for d in dims if all(x.shape[d] == n for x, (n, _) in zip(tensors, parts, strict=False))]
    if along:
        return next((d for d in along if d > 0), along[0])
    rest = {(*x.shape[1:],) for x in tensors}
    is_flat = len(rest) == 1 and tensors[0].ndim >= 2 and all(x.shape[0] > 1 for x in tensors)
    return 0 if is_flat and (tensors[0].ndim == 2 or len({x.shape[0] for x in tensors}) > 1) else None


def result_dims(whole: Any, pieces: list[Any]) -> list[int | None]:
    """Along which dims the results of pieces add up to that of the whole."""
    dims: list[int | None] = []
    for place, x in enumerate(tensors_of(whole)):
        parts = [tensors_of(piece)[place] for piece in pieces if place < len(tensors_of(piece))]
        fits = [
            d
            for d in range(x.ndim)
            if all(p.ndim == x.ndim for p in parts) and sum(p.shape[d] for p in parts) == x.shape[d]
        ]
        dims.append(fits[0] if fits else None)
    return dims


def joined(parts: list[Any], dims: list[int | None]) -> Any:
    """The tensors of `parts` one after another; what has no dim of tokens is the first's."""
    columns = list(zip(*(tensors_of(part) for part in parts), strict=False))
    tensors = [c[0] if d is None else torch.cat(c, dim=d) for c, d in zip(columns, dims, strict=False)]
    return with_tensors(parts[0], tensors)


def cut(whole: Any, dims: list[int | None]) -> list[Any]:
    """In two or three."""
    tensors = tensors_of(whole)
    num = min([3, *(x.shape[d] for x, d in zip(tensors, dims, strict=True) if d is not None)])
    pieces = []
    for index in range(num):
        cuts = [
            x if d is None else x.tensor_split(num, dim=d)[index] for x, d in zip(tensors, dims, strict=True)
        ]
        pieces.append(with_tensors(whole, cuts))
    return pieces


def first_and_rest(whole: Any, dims: list[int | None]) -> list[Any]:
    """The first token, as a chunk may be, and the rest."""
    tensors, cuts = tensors_of(whole), []
    for start, end in ((0, 1), (1, None)):
        tokens = [
            x if d is None else x.narrow(d, start, (end or x.shape[d]) - start)
            for x, d in zip(tensors, dims, strict=True)
        ]
        cuts.append(with_tensors(whole, tokens))
    return cuts


def repeated(whole: Any, dims: list[int | None], factor: float) -> Any:
    """The tokens of `whole` over and over: `factor` times as many, or the first of them."""
    tensors = [
        x if d is None else x.index_select(d, _over_and_over(x, x.shape[d], factor))
        for x, d in zip(tensors_of(whole), dims, strict=True)
    ]
    return with_tensors(whole, tensors)


def matched(whole: Tensor, found: Tensor, factor: float) -> Iterator[tuple[Tensor, Tensor]]:
    """Piece by piece, what of `whole` the pieces of `found` are to be, whose tokens are `repeated`. What has
    another shape than that is matched with all of `whole`."""
    others = [d for d, (a, b) in enumerate(zip(whole.shape, found.shape, strict=False)) if a != b]
    along = others[0] if whole.ndim == found.ndim and len(others) == 1 else None
    if along is None or found.shape[along] != round(whole.shape[along] * factor):
        yield whole, found
        return
    length = whole.shape[along]
    for start in range(0, found.shape[along], length):
        num = min(length, found.shape[along] - start)
        yield whole.narrow(along, 0, num), found.narrow(along, start, num)


def _over_and_over(like: Tensor, num: int, factor: float) -> Tensor:
    return torch.arange(round(num * factor), device=like.device) % max(num, 1)


def tensors_of(x: Any) -> list[Tensor]:
    found: list[Tensor] = []
    map_tensors(x, lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
    return found


def with_tensors(like: Any, tensors: list[Tensor]) -> Any:
    """`like`, with other tensors in the places of its own."""
    rest = iter(tensors)
    return map_tensors(like, lambda x: next(rest, x))


def map_tensors(x: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(x, Tensor):
        return function(x)
    if isinstance(x, Mapping):
        return {key: map_tensors(item, function) for key, item in x.items()}
    if isinstance(x, (tuple, list)):
        items = [map_tensors(item, function) for item in x]
        return type(x)(*items) if hasattr(x, "_fields") else type(x)(items)
    return x
