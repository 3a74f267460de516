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
from torch import Tensor, nn
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from trl.trainer.utils import FusedCausalLMOutput

from chunkdist.data.streams import NO_LABEL
from chunkdist.engine.method import method_like
from chunkdist.loss.lazy_logits import tiled_head
from chunkdist.loss.token_metrics import token_figures
from chunkdist.models.layers import causal_lm_of


def install_tiled_loss(model: nn.Module, args: Any) -> None:
    """For a chunked model that a trainer has put its fused head into; does nothing where the loss is another
    one than the mean of negative log-likelihoods, or the head is no plain linear map."""
    causal_lm = causal_lm_of(model)
    if args.loss_type != "nll" or args.label_smoothing_factor or tiled_head(causal_lm) is None:
        return
    inner = causal_lm.forward
    # torch.compile leaves it alone; without that, dynamo asks for its file, and a partial has none (2.13)
    call = torch.compiler.disable(partial(_forward, inner))
    causal_lm.forward = method_like(inner, call, causal_lm)


def _forward(
    inner: Callable[..., Any],
    model: Any,
    *args: Any,
    fused_lm_head: bool = False,
    num_items_in_batch: Tensor | int | None = None,
    **kwargs: Any,
) -> Any:
    """As TRL's own: `loss` is a mean, or the sum divided by `num_items_in_batch`."""
    labels: Tensor | None = kwargs.get("labels")
    if not fused_lm_head or labels is None or tiled_head(model) is None:
        if num_items_in_batch is not None:
            kwargs["num_items_in_batch"] = num_items_in_batch
        return inner(*args, fused_lm_head=fused_lm_head, **kwargs)
    with token_figures() as figures:
        outputs = inner(*args, **kwargs, num_items_in_batch=1)
    negative_sum = figures.loss
    assert negative_sum is not None, f"{type(model).__name__} computed no loss of its tokens"
    aux_loss = _balance_loss(model, outputs, kwargs.get("attention_mask"))
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


def _balance_loss(model: Any, outputs: Any, attention_mask: Tensor | None) -> Tensor | None:
    """The load-balancing loss of a mixture of experts: the model's own, or else as TRL (1.16) computes it."""
    router_logits = getattr(outputs, "router_logits", None)
    if not router_logits:
        return None
    aux_loss: Tensor | None = getattr(outputs, "aux_loss", None)
    if aux_loss is None:
        config = model.config.get_text_config()
        sizes = config.num_experts, config.num_experts_per_tok
        aux_loss = torch.as_tensor(load_balancing_loss_func(router_logits, *sizes, attention_mask))
    return aux_loss
