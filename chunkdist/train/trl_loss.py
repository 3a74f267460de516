"""chunkdist's tiled loss in the place of TRL's fused head, with the figures that TRL logs.

TRL's `SFTTrainer` (1.16) asks a model for `fused_lm_head=True`, takes the sum of what it gets for each token,
and divides it itself. Its head keeps copies of all hidden states in fp32; chunkdist's keeps none, runs tile
by tile, and its gradient is ready when its backward begins.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from trl.trainer.utils import FusedCausalLMOutput

from chunkdist.data.streams import NO_LABEL
from chunkdist.engine.method import method_like
from chunkdist.loss.fused_head import balance_loss
from chunkdist.loss.lazy_logits import tiled_head
from chunkdist.loss.token_metrics import token_figures
from chunkdist.models.layers import causal_lm_of


def install_tiled_loss(trainer: Any) -> None:
    """For a trainer whose model is chunked: the mean of negative log-likelihoods in one pass of the head, and
    label smoothing without logits. Other losses are made of what the chunked model hands out for each token;
    where the head is no plain linear map, all stays TRL's."""
    args, causal_lm = trainer.args, causal_lm_of(trainer.model)
    if args.loss_type != "nll" or tiled_head(causal_lm) is None:
        return
    if args.label_smoothing_factor and trainer.aux_loss_enabled:
        return
    trainer.label_smoother = None  # it would ask for the logits of the whole sequence
    inner = causal_lm.forward
    # torch.compile leaves it alone; without that, dynamo asks for its file, and a partial has none (2.13)
    call = torch.compiler.disable(partial(_forward, inner, args.label_smoothing_factor))
    causal_lm.forward = method_like(inner, call, causal_lm)


def _forward(
    inner: Callable[..., Any],
    label_smoothing: float,
    model: Any,
    *args: Any,
    fused_lm_head: bool = False,
    num_items_in_batch: Tensor | int | None = None,
    **kwargs: Any,
) -> Any:
    """As TRL's own: `loss` is a mean, or the sum divided by `num_items_in_batch`."""
    labels: Tensor | None = kwargs.get("labels")
    if not fused_lm_head or labels is None or label_smoothing or tiled_head(model) is None:
        if num_items_in_batch is not None:
            kwargs["num_items_in_batch"] = num_items_in_batch
        if fused_lm_head and label_smoothing:
            kwargs["label_smoothing"] = label_smoothing
        return inner(*args, fused_lm_head=fused_lm_head, **kwargs)
    with token_figures() as figures:
        outputs = inner(*args, **kwargs, num_items_in_batch=1)
    negative_sum = figures.loss
    assert negative_sum is not None, f"{type(model).__name__} computed no loss of its tokens"
    aux_loss = balance_loss(model, outputs, kwargs.get("attention_mask"))
    shifted = kwargs.get("shift_labels")
    mask = (labels[:, 1:] if shifted is None else shifted) != NO_LABEL
    entropy, num_correct = (
        torch.as_tensor(x, device=negative_sum.device) for x in (figures.entropy, figures.num_correct)
    )
    num_items = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    loss = negative_sum / torch.as_tensor(num_items, device=negative_sum.device)
    if aux_loss is not None:
        loss = loss + getattr(model.config.get_text_config(), "router_aux_loss_coef", 0.0) * aux_loss
    # Sums where TRL has a number for each token: it sums them.
    return FusedCausalLMOutput(
        loss=loss,
        log_probs=-negative_sum,
        entropy=entropy,
        log_sum_sq_probs=None,
        mean_logits=None,
        is_top1=num_correct,
        label_mask=mask,
        aux_loss=aux_loss,
    )
