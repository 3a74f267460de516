"""Sequence parallelism: the ranks of a group share the tokens of the same rows.

Each passes a contiguous, equal part of every row, as Accelerate's and DeepSpeed's own sequence parallelism
hand them out. Cut into chunks, such parts would leave all ranks but one idle. So where the decoder begins,
tokens change places, and each rank has an equal part of every chunk; where it ends, hidden states go back,
and head, loss and trainer see the parts that they passed.

To engines, the ranks of a group are data-parallel ranks whose losses are parts of one sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from chunkdist.attention.heads import HeadExchange
from chunkdist.stream.stream import Stream


class SequenceGroup:
    """The ranks that share the tokens of a model's rows, in the order of their parts.

    Args:
        in_training_only: Each rank evaluates whole rows of its own.
    """

    def __init__(self, group: ProcessGroup, *, in_training_only: bool = False) -> None:
        self.group, self.in_training_only = group, in_training_only
        self.num_ranks, self.rank = group.size(), group.rank()
        self.heads = HeadExchange(group)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # a copied model is in the same group

    def gather(self, x: Tensor, dim: int = -1) -> Tensor:
        """The equal parts of all ranks, one after another along `dim`."""
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.num_ranks)]
        distributed.all_gather(parts, x.contiguous(), group=self.group)
        return torch.cat(parts, dim)

    def refuse_difference(self, values: dict[str, int], like: Tensor) -> None:
        """Raises on all ranks where they do not agree.

        Args:
            values: By what the user calls them.
            like: On the device of the group's collectives.

        Raises:
            ValueError: names what differs, by rank.
        """
        own = torch.tensor([list(values.values())], device=like.device)
        by_rank = self.gather(own, 0).tolist()
        for name, found in zip(values, zip(*by_rank, strict=True), strict=True):
            if len(set(found)) > 1:
                raise ValueError(
                    f"the ranks of the sequence group passed different {name} ({', '.join(map(str, found))}):"
                    " each passes a part of the same rows, all parts of equal length; pad rows on the right "
                    "to a multiple of the ranks, with labels of -100"
                )

    def shifted(self, labels_BT: Tensor, ignored: int) -> Tensor:
        """The labels of this rank's part, each at the token before: the last one is of the next rank."""
        first_PB = self.gather(labels_BT[None, :, 0], 0)
        is_last = self.rank == self.num_ranks - 1
        after_B = torch.full_like(labels_BT[:, 0], ignored) if is_last else first_PB[self.rank + 1]
        return torch.cat([labels_BT[:, 1:], after_B[:, None]], dim=1)

    def total(self, x: Tensor) -> Tensor:
        """The sum over the ranks."""
        x = x.clone()
        distributed.all_reduce(x, group=self.group)
        return x

    def of_first(self, x: Tensor) -> Tensor:
        """The first rank's `x`, which has the same shape everywhere."""
        return self.gather(x[None], 0)[0]


class TokenExchange:
    """Tokens between the contiguous parts that ranks pass and their parts of each chunk.

    Args:
        whole: The tokens of all ranks. Their number, and that of each chunk, is a multiple of the ranks.
    """

    def __init__(self, group: SequenceGroup, whole: Stream, device: torch.device) -> None:
        self._group = group.group
        size, num_own = group.num_ranks, whole.num_tokens // group.num_ranks
        starts = torch.tensor([chunk.start for chunk in whole.chunks])
        shares = torch.tensor([chunk.num_tokens // size for chunk in whole.chunks])
        part = torch.arange(group.rank * num_own, (group.rank + 1) * num_own)
        index = torch.searchsorted(starts, part, right=True) - 1
        owner = (part - starts[index]) // shares[index]
        order = owner.argsort(stable=True)
        self.positions = torch.cat(
            [
                torch.arange(chunk.start + group.rank * share, chunk.start + (group.rank + 1) * share)
                for chunk, share in zip(whole.chunks, shares.tolist(), strict=True)
            ]
        ).to(device)
        """(T/P,): where this rank's parts of the chunks stand in the rows."""
        self._order, self._back = order.to(device), order.argsort().to(device)
        self._sent = owner.bincount(minlength=size).tolist()
        self._received = (self.positions.cpu() // num_own).bincount(minlength=size).tolist()

    def to_chunks(self, x_BT: Tensor) -> Tensor:
        """(B, T/P, ...) of this rank's part of the rows to (B, T/P, ...) of its parts of the chunks;
        differentiable."""
        result: Tensor = _Exchange.apply(self, True, x_BT)  # type: ignore[no-untyped-call]
        return result

    def to_rows(self, x_BT: Tensor) -> Tensor:
        """The way back."""
        result: Tensor = _Exchange.apply(self, False, x_BT)  # type: ignore[no-untyped-call]
        return result

    def run(self, x_BT: Tensor, to_chunks: bool) -> Tensor:
        """What `to_chunks` or `to_rows` return, without a graph."""
        x_TB = x_BT.transpose(0, 1)
        if to_chunks:
            return (
                self._all_to_all(x_TB[self._order], self._sent, self._received).transpose(0, 1).contiguous()
            )
        return self._all_to_all(x_TB, self._received, self._sent)[self._back].transpose(0, 1).contiguous()

    def _all_to_all(self, x_TB: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        result = torch.empty_like(x_TB, memory_format=torch.contiguous_format)
        distributed.all_to_all_single(result, x_TB.contiguous(), list(received), list(sent), self._group)
        return result


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: TokenExchange, to_chunks: bool, x_BT: Tensor) -> Tensor:
        ctx.exchange, ctx.to_chunks = exchange, to_chunks
        return exchange.run(x_BT, to_chunks)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BT: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, ctx.exchange.run(grad_BT, not ctx.to_chunks)
