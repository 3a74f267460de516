"""Figures of each token's distribution under a linear head, in tiles: what the losses of preference and
reinforcement learning are made of.

A loss may weigh each token as it likes, so that gradients are known in the backward only: there a tile's
logits are made again (as in TRL's fused head, 1.16). Kept are two numbers a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from chunkdist.loss.cross_entropy import tile_tokens, tiles_with_labels
from chunkdist.recovery import attempt, zeros
from chunkdist.replay import AutocastState

NAMES = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
"""Fields of TRL's `FusedCausalLMOutput`. The first two have gradients."""


@dataclass(frozen=True, kw_only=True)
class Head:
    """What becomes of the projection, in at least fp32: `softcap * tanh(scale * x / softcap) / temperature`.

    Args:
        in_fp32: The projection itself is in fp32, outside of autocast.
        label_smoothing: The share of the uniform distribution in what `log_probs` is the expectation of.
        names: The figures that are asked for.
    """

    temperature: float = 1.0
    scale: float = 1.0
    softcap: float | None = None
    in_fp32: bool = False
    label_smoothing: float = 0.0
    names: tuple[str, ...] = NAMES
    ignore_index: int = -100

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(..., H) to (..., V), in at least fp32."""
        if self.in_fp32:
            with torch.autocast(hidden.device.type, enabled=False):
                x = F.linear(hidden.float(), weight.float(), None if bias is None else bias.float())
        else:
            x = F.linear(hidden, weight, bias)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        x = x if self.scale == 1 else x * self.scale
        if self.softcap is not None:
            x = self.softcap * torch.tanh(x / self.softcap)
        return x if self.temperature == 1 else x / self.temperature


def token_figures_of(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, head: Head
) -> tuple[Tensor | None, ...]:
    """The figures `NAMES`, (...) in at least fp32 each; `None`: not asked for. 0 where a label is ignored.

    Args:
        hidden: (..., H); weight: (V, H); bias: (V,); labels: (...), of the tokens to be predicted.
    """
    hidden_NH = hidden.reshape(-1, hidden.shape[-1])
    found: Any = _TiledFigures.apply(hidden_NH, weight, bias, labels.reshape(-1), head)  # type: ignore[no-untyped-call]
    return tuple(None if x is None else x.view(labels.shape) for x in found)


class _TiledFigures(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, labels_N: Tensor, head: Head
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        ctx.head, ctx.autocast = head, AutocastState.capture(hidden_NH.device.type)
        dtype = torch.promote_types(hidden_NH.dtype, torch.float32)
        found: dict[str, Tensor] = {
            name: hidden_NH.new_zeros(len(labels_N), dtype=torch.bool if name == "is_top1" else dtype)
            for name in ("logsumexp", *head.names)
        }
        num_tokens = tile_tokens(weight_VH.shape[0], hidden_NH.element_size())
        ctx.tiles = [
            slice(start, start + num_tokens)
            for start in tiles_with_labels(labels_N, num_tokens, head.ignore_index)
        ]
        for tile in ctx.tiles:
            logits_NV = head.logits(hidden_NH[tile], weight_VH, bias_V)
            has_label_N = labels_N[tile] != head.ignore_index
            for name, x_N in _figures(logits_NV, labels_N[tile].clamp(min=0), head).items():
                if name in found:
                    found[name][tile] = x_N if name == "logsumexp" else x_N.where(has_label_N, 0)
            del logits_NV
        entropy_N = found.get("entropy")
        ctx.save_for_backward(hidden_NH, weight_VH, bias_V, labels_N, found["logsumexp"], entropy_N)
        ctx.mark_non_differentiable(*(found[name] for name in head.names if name in NAMES[2:]))
        return tuple(found.get(name) for name in NAMES)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_log_probs_N: Tensor | None, grad_entropy_N: Tensor | None, *others: None
    ) -> tuple[Tensor | None, ...]:
        hidden_NH, weight_VH, bias_V, *_ = ctx.saved_tensors
        needed = [
            x if need else None
            for x, need in zip((hidden_NH, weight_VH, bias_V), ctx.needs_input_grad[:3], strict=True)
        ]
        grads = attempt(
            lambda: _gradients(ctx, needed, grad_log_probs_N, grad_entropy_N),
            lambda: [None if x is None else zeros(x) for x in needed],
        )
        return *grads, None, None


def _figures(logits_NV: Tensor, labels_N: Tensor, head: Head) -> dict[str, Tensor]:
    """In place where it can be: a tile has room for its logits, their gradient, and no third."""
    logsumexp_N = logits_NV.logsumexp(-1)
    found = {"logsumexp": logsumexp_N}
    log_probs_N = logits_NV.gather(-1, labels_N[:, None])[:, 0] - logsumexp_N
    if head.label_smoothing:
        log_probs_N = torch.lerp(log_probs_N, logits_NV.mean(-1) - logsumexp_N, head.label_smoothing)
    found["log_probs"] = log_probs_N
    if "mean_logits" in head.names:
        found["mean_logits"] = logits_NV.mean(-1)
    if "is_top1" in head.names:
        found["is_top1"] = logits_NV.argmax(-1) == labels_N
    if {"entropy", "log_sum_sq_probs"} & set(head.names):
        probabilities_NV = (logits_NV - logsumexp_N[:, None]).exp_()
        found["entropy"] = logsumexp_N - torch.einsum("nv,nv->n", probabilities_NV, logits_NV)
        found["log_sum_sq_probs"] = torch.einsum("nv,nv->n", probabilities_NV, probabilities_NV).log()
    return found


def _gradients(
    ctx: Any, needed: list[Tensor | None], grad_log_probs_N: Tensor | None, grad_entropy_N: Tensor | None
) -> list[Tensor | None]:
    """Gradients of the hidden states, the weight and the bias, where needed; weights' are summed in fp32."""
    head: Head = ctx.head
    hidden_NH, weight_VH, bias_V, labels_N, logsumexp_N, entropy_N = ctx.saved_tensors
    grad_hidden_NH = None if needed[0] is None else torch.zeros_like(hidden_NH)
    sums = [
        None if x is None else torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
        for x in needed[1:]
    ]
    leaves = [
        None if x is None else x.detach().requires_grad_(need is not None)
        for x, need in zip((weight_VH, bias_V), needed[1:], strict=True)
    ]
    for tile in ctx.tiles:
        hidden = hidden_NH[tile].detach().requires_grad_(needed[0] is not None)
        with torch.enable_grad(), ctx.autocast.apply():
            logits_NV = head.logits(hidden, *leaves)  # type: ignore[arg-type]
        grads = [None if g is None else g[tile, None] for g in (grad_log_probs_N, grad_entropy_N)]
        grad_NV = _gradient_of_logits(
            logits_NV.detach(), labels_N[tile], logsumexp_N[tile, None], entropy_N, tile, grads, head
        )
        logits_NV.backward(grad_NV)
        del logits_NV, grad_NV
        if grad_hidden_NH is not None:
            assert hidden.grad is not None
            grad_hidden_NH[tile] = hidden.grad
        for total, leaf in zip(sums, leaves, strict=True):
            if total is not None and leaf is not None and leaf.grad is not None:
                total += leaf.grad
                leaf.grad = None
    totals = [None if total is None else total.to(weight_VH.dtype) for total in sums]
    return [grad_hidden_NH, *totals]


def _gradient_of_logits(
    logits_NV: Tensor,
    labels_N: Tensor,
    logsumexp_N1: Tensor,
    entropy_N: Tensor | None,
    tile: slice,
    grads: list[Tensor | None],
    head: Head,
) -> Tensor:
    """d log p(y) = 1[y] - p, where 1[y] may be smoothed; d entropy = -p (log p + entropy)."""
    has_label_N1 = (labels_N != head.ignore_index)[:, None]
    grad_log_probs_N1, grad_entropy_N1 = (None if g is None else g * has_label_N1 for g in grads)
    grad_NV = (logits_NV - logsumexp_N1).exp_()
    factor: Any = 0.0 if grad_log_probs_N1 is None else -grad_log_probs_N1
    if grad_entropy_N1 is not None:
        assert entropy_N is not None
        log_p_NV = logits_NV - logsumexp_N1
        factor = log_p_NV.add_(entropy_N[tile, None]).mul_(-grad_entropy_N1).add_(factor)
    grad_NV.mul_(factor)
    if grad_log_probs_N1 is not None:
        epsilon, vocab_size = head.label_smoothing, logits_NV.shape[-1]
        if epsilon:
            grad_NV.add_(grad_log_probs_N1 * (epsilon / vocab_size))
        own = grad_log_probs_N1 * (1 - epsilon)
        grad_NV.scatter_add_(-1, labels_N.clamp(min=0)[:, None], own)
    return grad_NV
