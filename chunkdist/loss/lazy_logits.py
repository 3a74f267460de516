"""Linear cross-entropy in tiles: the logits of a whole sequence never exist.

A causal LM computes `logits = head(hidden)`, changes them (soft-cap, scale, `.float()`), and hands them to
its loss function. During a forward with labels, the head returns `LazyLogits` instead, and the loss function
takes it tile by tile, gradients included, so that the head runs once (as in Liger, arXiv 2410.10989, section
3.2).

The head is called when its weights are needed, not before: what it does then stands in for its forward, and
the hooks of sharding engines gather, release and reduce around that call as they would around any other.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from chunkdist.loss.cross_entropy import linear_cross_entropy
from chunkdist.loss.head_hooks import foreign_hook
from chunkdist.loss.lazy_forward import LazyForward
from chunkdist.loss.lazy_tensor import LazyLogits, computed
from chunkdist.loss.token_metrics import running_figures
from chunkdist.recovery import attempt, no_loss

logger = logging.getLogger(__name__)

Note = Callable[[Tensor, Tensor], None]


def tiled_head(model: PreTrainedModel) -> nn.Linear | None:
    """The output layer, if its logits are made in tiles; `None`: all of them are made.

    Where PEFT trains the head whole (`modules_to_save`), it is the copy that it trains.
    """
    head = _called_head(model.get_output_embeddings())
    # not `type(head)`: FSDP2 gives a module another class
    is_linear = (
        isinstance(head, nn.Linear)
        and type(head).forward is nn.Linear.forward
        and "forward" not in head.__dict__
    )
    if not is_linear or model.loss_function is not ForCausalLMLoss or _hook_on_head(model) is not None:
        return None
    assert isinstance(head, nn.Linear)
    return head


def untiled_reason(model: PreTrainedModel) -> str:
    """Why `tiled_head` is `None`."""
    hook = _hook_on_head(model)
    if hook is not None:
        return f"a hook on the output layer, {hook}, is to see them"
    kind = type(model.get_output_embeddings()).__name__
    return f"the output layer, {kind}, is no plain linear layer, or the loss is not the usual one"


def _called_head(outer: Any) -> Any:
    """What PEFT's wrapper (`modules_to_save`, 0.21) calls now; else the output layer itself."""
    copies = getattr(outer, "modules_to_save", None)
    if not isinstance(copies, nn.ModuleDict):
        return outer
    active = outer.active_adapters
    is_copy = len(active) == 1 and active[0] in copies and not outer.disable_adapters
    return copies[active[0]] if is_copy else outer.original_module


def _hook_on_head(model: PreTrainedModel) -> str | None:
    outer = model.get_output_embeddings()
    return None if outer is None else foreign_hook([outer, _called_head(outer)])


@cache
def _warn(reason: str) -> None:
    """Says it once."""
    logger.warning("chunkdist: the logits of the whole sequence will be made: %s", reason)


@contextmanager
def lazy_logits(model: PreTrainedModel, note: Note | None = None) -> Iterator[None]:
    """Inside, `model`'s head returns `LazyLogits` and its loss function takes them tile by tile.

    A head that is no plain linear map or has hooks of the user's, or a loss of the model's own, stays as it
    is, with all its logits.

    Args:
        note: Called with the loss of each token and whether it has a label, (B, T) each; not where the logits
            stay.
    """
    head = tiled_head(model)
    if head is None:
        if _hook_on_head(model) is not None:
            _warn(untiled_reason(model))
        yield
        return
    outer = model.get_output_embeddings()
    assert outer is not None
    forward = LazyForward(outer)

    def call(hidden: Tensor) -> Tensor:
        return LazyLogits.of_head(hidden, head, forward)

    # The one attribute of a module that comes before its hooks (torch.nn.Module._wrapped_call_impl, 2.13).
    attribute = "_compiled_call_impl"
    before = [
        (outer, attribute, outer.__dict__.get(attribute)),
        (model, "_loss_function", model.__dict__.get("_loss_function")),
    ]
    try:
        outer._compiled_call_impl = call
        model._loss_function = (
            tiled_causal_lm_loss if note is None else partial(tiled_causal_lm_loss, chunkdist_note=note)
        )
        yield
    finally:
        forward.is_running = False
        for owner, name, value in before:
            if value is None:
                owner.__dict__.pop(name, None)
            else:
                owner.__dict__[name] = value


def tiled_causal_lm_loss(logits: Tensor, labels: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
    """As `_loss`, which trainers may ask for alone."""
    loss = _loss(logits, labels, *args, **kwargs)
    if (figures := running_figures()) is not None:
        figures.loss = loss.clone()  # models add their other losses to it in place
    return loss


def _loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    chunkdist_note: Note | None = None,
    **kwargs: Any,
) -> Tensor:
    """transformers' `ForCausalLMLoss`, for `LazyLogits` without ever making them.

    Args:
        logits: (B, T, V).
        labels: (B, T), shifted here; `shift_labels`: (B, T), shifted already.
        num_items_in_batch: The loss is the sum over tokens divided by this; else the mean, 0 if all are
            ignored.
        chunkdist_note: `note` of `lazy_logits`; columns of a batch, of any name, come as arguments, too.
    """
    lazy = logits.for_tiles() if isinstance(logits, LazyLogits) else None
    if lazy is None or lazy.shape[-1] != vocab_size:
        num_items: Any = num_items_in_batch
        return ForCausalLMLoss(
            computed(logits), labels, vocab_size, num_items, ignore_index, shift_labels, **kwargs
        )
    if shift_labels is None:
        assert labels is not None
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]

    def loss_of(hidden: Tensor) -> Tensor:
        weight, bias = lazy.head.weight, lazy.head.bias

        def compute() -> Tensor:
            targets = shift_labels.to(hidden.device)
            by_token = (
                None if chunkdist_note is None else targets.new_zeros(targets.shape, dtype=torch.float32)
            )
            loss = linear_cross_entropy(
                hidden,
                weight,
                bias,
                targets,
                operations=lazy.operations,
                num_items=num_items_in_batch,
                ignore_index=ignore_index,
                token_losses=by_token,
            )
            if chunkdist_note is not None and by_token is not None:
                chunkdist_note(by_token, targets != ignore_index)
            return loss

        return attempt(compute, lambda: no_loss(hidden, weight, bias))

    loss = lazy.call_head(loss_of)
    if loss.requires_grad:
        loss.register_hook(lazy.forward_run.observed.refuse)
    return loss
