"""The tiled head of a chunked model in the place of the one that TRL's trainers put into it.

`trl.trainer.utils.add_fused_lm_head` (TRL 1.15 and 1.16) replaces a model's forward: called with
`fused_lm_head=True` and labels, it returns figures of each token instead of logits. What it was told is in
the closure of that forward; where it cannot be read, TRL's own runs. TRL's keeps a copy of the hidden states
and sums their gradients in fp32; this one does neither.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from chunkdist.loss.lazy_forward import LazyForward
from chunkdist.loss.lazy_logits import tiled_head
from chunkdist.loss.lazy_tensor import LazyLogits
from chunkdist.loss.token_figures import NAMES, Head, token_figures_of

_NO_LABEL = -100
_SETTINGS = {
    *("temperature", "logit_scale", "final_logit_softcapping", "cast_lm_head_to_fp32", "outputs"),
    *("backbone_attr", "text_config"),
}
"""Variables that TRL's forward closes over."""


@dataclass(frozen=True, kw_only=True)
class FusedHead:
    """A forward with `fused_lm_head=True` of one model.

    Args:
        settings: What TRL was told.
        output_class: TRL's `FusedCausalLMOutput`.
    """

    model: PreTrainedModel
    head: nn.Linear
    settings: dict[str, Any]
    output_class: type

    @classmethod
    def of(cls, forward: Any, model: PreTrainedModel, kwargs: dict[str, Any]) -> FusedHead | None:
        """`None`: `forward` is not TRL's, or is to do what this head cannot do.

        Raises:
            RuntimeError: labels are to be smoothed, which TRL's own head cannot do.
        """
        found = cls._of(forward, model, kwargs)
        if found is None and kwargs.get("label_smoothing"):
            raise RuntimeError(
                "labels cannot be smoothed any more: since the trainer was made, the output layer has been "
                "changed, or got a hook"
            )
        return found

    @classmethod
    def _of(cls, forward: Any, model: PreTrainedModel, kwargs: dict[str, Any]) -> FusedHead | None:
        function = getattr(forward, "__func__", forward)
        code: Any = getattr(function, "__code__", None)
        own = getattr(function, "__globals__", {})
        if getattr(code, "co_name", "") != "_fused_forward" or "FusedCausalLMOutput" not in own:
            return None
        settings = {
            name: cell.cell_contents
            for name, cell in zip(code.co_freevars, function.__closure__, strict=True)
        }
        head = tiled_head(model)
        if head is None or not settings.keys() >= _SETTINGS or not set(settings["outputs"]) <= set(NAMES):
            return None
        return cls(model=model, head=head, settings=settings, output_class=own["FusedCausalLMOutput"])

    def __call__(
        self,
        *args: Any,
        labels: Tensor,
        fused_lm_head: bool,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        label_smoothing: float = 0.0,
        **kwargs: Any,
    ) -> Any:
        """As TRL's own. `loss` is a mean, or the sum divided by `num_items_in_batch`.

        Args:
            label_smoothing: As in `Head`.
        """
        settings = self.settings
        kwargs["use_cache"] = False
        if getattr(settings["text_config"], "output_router_logits", False):
            kwargs.setdefault("output_router_logits", True)
        outputs = getattr(self.model, settings["backbone_attr"])(*args, **kwargs)
        hidden_BTH = outputs.last_hidden_state
        targets_BT = F.pad(labels, (0, 1), value=_NO_LABEL)[:, 1:] if shift_labels is None else shift_labels
        how = Head(
            temperature=settings["temperature"],
            scale=settings["logit_scale"],
            softcap=settings["final_logit_softcapping"],
            in_fp32=settings["cast_lm_head_to_fp32"],
            names=("log_probs", *(name for name in settings["outputs"] if name != "log_probs")),
            label_smoothing=label_smoothing,
        )

        def figures(hidden: Tensor) -> Any:
            weight, bias = self.head.weight, self.head.bias
            hidden, targets = hidden.to(weight.device), targets_BT.to(weight.device)  # device_map
            return token_figures_of(hidden, weight, bias, targets, how)

        lazy = LazyLogits.of_head(hidden_BTH, self.head, LazyForward(self.model.get_output_embeddings()))
        found: Any = lazy.call_head(figures)
        if shift_labels is None:  # as many as TRL's, which are predictions of the tokens after the first
            found, targets_BT = [None if x is None else x[:, :-1] for x in found], targets_BT[:, :-1]
        named = dict(zip(NAMES, found, strict=True))
        mask: Tensor = targets_BT.to(named["log_probs"].device) != _NO_LABEL
        num_items = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        loss = -named["log_probs"].sum() / torch.as_tensor(num_items, device=mask.device)
        aux_loss = None
        if kwargs.get("output_router_logits"):
            aux_loss = balance_loss(self.model, outputs, kwargs.get("attention_mask"))
        if aux_loss is not None:
            loss = loss + getattr(settings["text_config"], "router_aux_loss_coef", 0.0) * aux_loss
        return self.output_class(loss=loss, **named, label_mask=mask, aux_loss=aux_loss)


def balance_loss(model: Any, outputs: Any, attention_mask: Tensor | None) -> Tensor | None:
    """The load-balancing loss of a mixture of experts: the model's own, or else as TRL (1.16) computes it."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    router_logits = getattr(outputs, "router_logits", None)
    if not router_logits:
        return None
    aux_loss: Tensor | None = getattr(outputs, "aux_loss", None)
    if aux_loss is None:
        config = model.config.get_text_config()
        sizes = config.num_experts, config.num_experts_per_tok
        aux_loss = torch.as_tensor(load_balancing_loss_func(router_logits, *sizes, attention_mask))
    return aux_loss
