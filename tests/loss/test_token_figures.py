"""Figures of each token in tiles: values and gradients of the plain computation, and no logits of a row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from chunkdist.loss import cross_entropy
from chunkdist.loss.token_figures import NAMES, Head, token_figures_of
from tests.helpers.row_logits import RowLogits

VOCAB, HIDDEN, TOKENS = 37, 8, 50
HEADS = (
    Head(),
    Head(temperature=0.7, scale=1.5, softcap=2.0),
    Head(label_smoothing=0.1, temperature=1.3),
    Head(in_fp32=True, names=("log_probs", "entropy")),
)


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
    draws = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*shape, generator=draws, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((2, TOKENS, HIDDEN), (VOCAB, HIDDEN), (VOCAB,))
    )
    labels = torch.randint(0, VOCAB, (2, TOKENS), generator=draws)
    labels[0, :20] = labels[1, 40:] = -100
    return hidden, weight, bias, labels


def plain(hidden: Any, weight: Any, bias: Any, labels: Any, head: Head) -> tuple[Any, ...]:
    logits = head.scale * F.linear(hidden, weight, bias)
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    logits = logits / head.temperature
    log_p = logits.log_softmax(-1)
    targets = labels.clamp(min=0)
    smooth = head.label_smoothing
    log_probs = (1 - smooth) * log_p.gather(-1, targets[..., None])[..., 0] + smooth * log_p.mean(-1)
    found = {
        "log_probs": log_probs,
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "log_sum_sq_probs": (2 * log_p).logsumexp(-1).detach(),
        "mean_logits": logits.mean(-1).detach(),
        "is_top1": logits.argmax(-1) == targets,
    }
    return tuple(found[name] * (labels != -100) if name in head.names else None for name in NAMES)


def loss_of(figures: Any) -> Any:
    draws = torch.Generator().manual_seed(1)
    return sum((x * torch.randn(2, TOKENS, generator=draws)).sum() for x in figures[:2])


@pytest.mark.parametrize("head", HEADS)
def test_figures_and_gradients_are_the_plain_ones(head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "TILE_BYTES", 1)  # tiles of 16 tokens
    tolerance = 1e-5 if head.in_fp32 else 1e-12
    results = []
    for function in (token_figures_of, plain):
        *leaves, labels = inputs()
        figures = function(*leaves, labels, head)
        loss_of(figures).backward()
        results.append((figures, [x.grad for x in leaves]))
    (found, grads), (expected, expected_grads) = results
    for name, x, y in zip(NAMES, found, expected, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            torch.testing.assert_close(x.double(), y.double(), rtol=tolerance, atol=tolerance, msg=name)
    for x, y in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


def test_one_gradient_alone_and_none() -> None:
    for index in (0, 1):
        results = []
        for function in (token_figures_of, plain):
            *leaves, labels = inputs()
            function(*leaves, labels, Head())[index].square().sum().backward()
            results.append([x.grad for x in leaves])
        for x, y in zip(*results, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)
    hidden, weight, _, labels = inputs()
    frozen = token_figures_of(hidden, weight.detach(), None, labels, Head())
    frozen[0].sum().backward()
    assert hidden.grad is not None
    assert weight.grad is None


def test_no_more_logits_than_a_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "TILE_BYTES", 1)
    *leaves, labels = inputs(torch.float32)
    with RowLogits(VOCAB) as logits, RowLogits(VOCAB, num_tokens=15) as tiles:
        loss_of(token_figures_of(*leaves, labels, Head())).backward()
    assert logits.count == 0
    assert tiles.count > 0


def test_autocast_is_that_of_the_forward() -> None:
    grads = []
    for inside in (True, False):
        *leaves, labels = inputs(torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(token_figures_of(*leaves, labels, Head()))
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        grads.append([x.grad for x in leaves])
    torch.testing.assert_close(grads[1], grads[0], rtol=0, atol=0)
