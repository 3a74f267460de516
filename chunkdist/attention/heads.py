"""Attention under sequence parallelism: all tokens of a chunk, for the heads of one rank (DeepSpeed-Ulysses,
arXiv 2309.14509).

The ranks of a sequence group have equal parts of each chunk, with all heads. One all-to-all gives each rank
its share of the heads for the whole chunk; another one takes its output back. What a rank sends does not grow
with the number of chunks. Every rank calls in the same order, in the backward too: autograd runs equal graphs
in an equal order.

B rows, T tokens of a chunk, P ranks, n heads of any kind, N query heads, K kv heads, D head dim.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from chunkdist.errors import UnsupportedModelError


class HeadExchange:
    """Exchanges tokens and heads between the ranks of a sequence group."""

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group
        self.num_ranks, self._rank = group.size(), group.rank()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # a copied model is in the same group

    def to_heads(self, *tensors_BTnD: Tensor) -> tuple[Tensor, ...]:
        """(B, T/P, n, D) each, of this rank's tokens, to (B, T, n/P, D) of its heads; differentiable.

        Fewer kv heads than ranks are repeated: ranks whose query heads share one get the same. Their
        gradients are summed.
        """
        whole: tuple[Tensor, ...] = _ToHeads.apply(  # type: ignore[no-untyped-call]
            self, *(self._repeated(x) for x in tensors_BTnD)
        )
        return whole

    def to_tokens(self, x_BTnD: Tensor) -> Tensor:
        """(B, T, n/P, D) of this rank's heads to (B, T/P, n, D) of its tokens; differentiable."""
        part: Tensor = _ToTokens.apply(self, x_BTnD)  # type: ignore[no-untyped-call]
        return part

    def own(self, x_N: Tensor) -> Tensor:
        """The elements of this rank's query heads, (N,) to (N/P,)."""
        return x_N.view(self.num_ranks, -1)[self._rank]

    def check(self, name: str, num_heads: int, num_kv_heads: int) -> None:
        """Raises `UnsupportedModelError` where heads cannot be shared equally."""
        size = self.num_ranks
        if num_heads % size or (num_kv_heads % size and size % num_kv_heads):
            raise UnsupportedModelError(
                f"{name} has {num_heads} query heads and {num_kv_heads} kv heads, and the sequence group "
                f"{size} ranks: query heads must be a multiple of the ranks, and kv heads a multiple or a "
                "divisor of them; take a group of another size"
            )

    def _repeated(self, x_BTnD: Tensor) -> Tensor:
        num_heads = x_BTnD.shape[2]
        if num_heads >= self.num_ranks:
            return x_BTnD
        return x_BTnD.repeat_interleave(self.num_ranks // num_heads, 2)

    def gather_tokens(self, tensors_BTnD: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """One all-to-all of all tensors, by their tokens: (B, T/P, n, D) to (B, T, n/P, D)."""
        size = self.num_ranks
        parts = [x.unflatten(2, (size, -1)).movedim(2, 0) for x in tensors_BTnD]
        received = self._all_to_all([x.flatten(-2) for x in parts])
        return tuple(
            x.movedim(0, 1).flatten(1, 2).unflatten(-1, part.shape[-2:]).contiguous()
            for x, part in zip(received, parts, strict=True)
        )

    def scatter_tokens(self, tensors_BTnD: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The way back: (B, T, n/P, D) to (B, T/P, n, D)."""
        size = self.num_ranks
        parts = [x.unflatten(1, (size, -1)).movedim(1, 0) for x in tensors_BTnD]
        received = self._all_to_all([x.flatten(-2) for x in parts])
        return tuple(
            x.unflatten(-1, part.shape[-2:]).movedim(0, 2).flatten(2, 3)
            for x, part in zip(received, parts, strict=True)
        )

    def _all_to_all(self, parts_PBTF: list[Tensor]) -> list[Tensor]:
        widths = [x.shape[-1] for x in parts_PBTF]
        sent = torch.cat(parts_PBTF, dim=-1).contiguous()
        received = torch.empty_like(sent)
        distributed.all_to_all_single(received, sent, group=self._group)
        return list(received.split(widths, dim=-1))


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: HeadExchange, *tensors_BTnD: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange = exchange
        return exchange.gather_tokens(tensors_BTnD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads_BTnD: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.exchange.scatter_tokens(grads_BTnD)


class _ToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: HeadExchange, x_BTnD: Tensor) -> Tensor:
        ctx.exchange = exchange
        return exchange.scatter_tokens((x_BTnD,))[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTnD: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.exchange.gather_tokens((grad_BTnD,))
