"""Linear cross-entropy in tiles of tokens, gradients included, so that the head runs once (as in Liger, arXiv
2410.10989, section 3.2)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from chunkdist.loss.token_metrics import running_figures
from chunkdist.recovery import attempt, zeros
from chunkdist.replay import no_leaf, refuse_second_derivatives

TILE_BYTES = 2**29
"""Memory of one tile: its logits in the model's dtype and in fp32, and their gradients."""

_MULTIPLE = 128

Operation = Callable[[Tensor], Tensor]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    operations: tuple[Operation, ...] = (),
    num_items: Tensor | int | None = None,
    ignore_index: int = -100,
    token_losses: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of `hidden @ weight.T + bias` after `operations`, in fp32, in tiles of tokens.

    Args:
        hidden: (..., H); weight: (V, H); bias: (V,); labels: (...), of the tokens to be predicted.
        num_items: Divides the sum; `None`: the number of labels that are not `ignore_index`, at least 1.
        token_losses: Zeros of the shape of `labels`, in fp32, contiguous: the loss of each token is written
            there.
    """
    labels_N = labels.reshape(-1)
    if num_items is None:
        num_items = (labels_N != ignore_index).sum().clamp(min=1)
    scale = 1 / torch.as_tensor(num_items, device=hidden.device, dtype=torch.float32)
    hidden_NH = hidden.reshape(-1, hidden.shape[-1])
    # fp16 gradients divided by the number of tokens would underflow before a loss scaler sees them
    late_scale = scale if hidden.dtype == torch.float16 else 1.0
    early_scale = torch.ones_like(scale) if hidden.dtype == torch.float16 else scale
    wants_grad = torch.is_grad_enabled()
    loss: Tensor = _TiledCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_NH, weight, bias, labels_N, early_scale, operations, ignore_index, wants_grad,
        None if token_losses is None else token_losses.view(-1),
    )  # fmt: skip
    return loss * late_scale


def tile_tokens(vocab_size: int, element_bytes: int) -> int:
    """Tokens of a tile: `TILE_BYTES` hold its logits, and their gradients, in the model's dtype and in
    fp32; where there are as many, whole tiles of the matrix products' kernels."""
    num_tokens = TILE_BYTES // (vocab_size * 2 * (element_bytes + 4))
    return num_tokens // _MULTIPLE * _MULTIPLE if num_tokens >= _MULTIPLE else max(16, num_tokens)


def logits_of(hidden: Tensor, weight: Any, bias: Any, *, operations: tuple[Operation, ...]) -> Tensor:
    """The head, and the elementwise operations after it."""
    logits = F.linear(hidden, weight, bias)
    for operation in operations:
        logits = operation(logits)
    return logits


class _TiledCrossEntropy(torch.autograd.Function):
    """The gradients are computed in the forward, while a tile's logits are there."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        labels_N: Tensor,
        scale: Tensor,
        operations: tuple[Operation, ...],
        ignore_index: int,
        wants_grad: bool,
        token_losses_N: Tensor | None,
    ) -> Tensor:
        needs = [wants_grad and need for need in ctx.needs_input_grad[:3]]
        num_tokens = tile_tokens(weight_VH.shape[0], hidden_NH.element_size())
        loss = hidden_NH.new_zeros((), dtype=torch.float32)
        figures = running_figures()
        grad_hidden = torch.zeros_like(hidden_NH) if needs[0] else None
        leaves = [
            None if x is None else x.detach().requires_grad_(need)
            for x, need in zip((weight_VH, bias_V), needs[1:], strict=True)
        ]
        sums = [
            torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
            if x is not None and x.requires_grad
            else None
            for x in leaves
        ]
        for start in tiles_with_labels(labels_N, num_tokens, ignore_index):
            tile = slice(start, start + num_tokens)
            hidden = hidden_NH[tile].detach().requires_grad_(needs[0])
            with torch.set_grad_enabled(any(needs)):
                logits = logits_of(no_leaf(hidden), *leaves, operations=operations).float()
                # What `F.cross_entropy` does. Liger puts its own there, which writes over the logits and
                # waits for the device.
                log_probs = F.log_softmax(logits, -1)
                nll = partial(F.nll_loss, target=labels_N[tile], ignore_index=ignore_index)
                tile_loss = nll(log_probs, reduction="sum") * scale
            if token_losses_N is not None:
                token_losses_N[tile] = nll(log_probs.detach(), reduction="none")
            del log_probs
            if figures is not None:
                figures.add(logits.detach(), labels_N[tile], ignore_index)
            del logits
            loss += tile_loss.detach()
            if not any(needs):
                continue
            tile_loss.backward()
            if grad_hidden is not None:
                assert hidden.grad is not None
                grad_hidden[tile] = hidden.grad
            for total, leaf in zip(sums, leaves, strict=True):
                if total is not None and leaf is not None and leaf.grad is not None:
                    total += leaf.grad
                    leaf.grad = None
        ctx.save_for_backward(
            grad_hidden, *(None if total is None else total.to(weight_VH.dtype) for total in sums)
        )
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives()
        saved: tuple[Tensor | None, ...] = ctx.saved_tensors
        grads = attempt(
            lambda: [None if x is None else x * grad_loss.to(x.dtype) for x in saved],
            lambda: [None if x is None else zeros(x) for x in saved],
        )
        return *grads, None, None, None, None, None, None


def tiles_with_labels(labels_N: Tensor, num_tokens: int, ignore_index: int) -> list[int]:
    """Starts of the tiles that have a label: prompts cost nothing."""
    starts = list(range(0, labels_N.shape[0], num_tokens))
    if isinstance(labels_N, FakeTensor):
        return starts
    num_tokens = min(num_tokens, max(1, labels_N.shape[0]))
    padded_N = F.pad(labels_N, (0, -labels_N.shape[0] % num_tokens), value=ignore_index)
    has_label = (padded_N.view(-1, num_tokens) != ignore_index).any(1).tolist()
    return [start for start, labelled in zip(starts, has_label, strict=True) if labelled]
