"""The error of independent draws, if only the sum over chunks were sampled, and all relays were exact."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel


def chunk_gradients(model: PreTrainedModel, row: Tensor, num_chunks: int) -> tuple[Tensor, Tensor]:
    """What each chunk's tokens give to the gradient of the linear weights of all decoder layers, everything
    that later chunks leave for its keys and values included.

    Args:
        model: Not chunked.
        row: (T,): tokens; num_chunks must divide T.

    Returns:
        (k,): the square of the norm of each chunk's share; and the square of the norm of their sum, ().
    """
    squares, whole = torch.zeros(num_chunks), torch.zeros(())
    handles: list[RemovableHandle] = []

    def watch(linear: torch.nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        def take(grad: Tensor) -> None:
            shares = torch.stack(
                [
                    g.T @ x
                    for g, x in zip(grad[0].chunk(num_chunks), inputs[0][0].chunk(num_chunks), strict=True)
                ]
            )
            squares.add_(shares.square().sum((1, 2)))
            whole.add_(shares.sum(0).square().sum())

        output.register_hook(take)

    for module in model.get_decoder().layers.modules():
        if isinstance(module, torch.nn.Linear):
            handles.append(module.register_forward_hook(watch))
    try:
        model(input_ids=row[None], labels=row[None]).loss.backward()
    finally:
        for handle in handles:
            handle.remove()
    return squares, whole


def direct_errors(
    model: PreTrainedModel, row: Tensor, num_chunks: int, budgets: Sequence[int]
) -> list[dict[str, float]]:
    """By budget, the relative rms error of the gradient if only the sum over chunks is sampled.

    Returns:
        `equal`, with the same probability for each chunk, and `best`, with probabilities in proportion to the
        norm of the chunk's share (at most 1), which no sampler knows before the backward.
    """
    squares, whole = chunk_gradients(model, row, num_chunks)
    norms, rows = squares.sqrt(), []
    for budget in budgets:
        equal = (num_chunks / budget - 1) * squares.sum()
        p = (norms * budget / norms.sum()).clamp(max=1)
        best = ((1 / p - 1) * squares).sum()
        rows.append(
            {"budget": budget, "equal": float((equal / whole).sqrt()), "best": float((best / whole).sqrt())}
        )
    return rows
