"""The balance loss of a mixture of experts, which TRL adds by default and a chunked model cannot compute."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig


def router_loss_coefficient(options: Any) -> float:
    """The coefficient to give to TRL (1.16): 0, of a model that has no such loss or whose user wants none.

    Raises:
        ValueError: TRL would add the loss, by the coefficient of the model's config.
    """
    model = options.model
    if options.training.router_aux_loss_coef is not None:
        return float(options.training.router_aux_loss_coef)
    try:
        config = AutoConfig.from_pretrained(
            model.model_name_or_path,
            revision=model.model_revision,
            trust_remote_code=options.training.trust_remote_code,
        ).get_text_config()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return 0.0  # loading the model will say what is wrong
    coefficient = getattr(config, "router_aux_loss_coef", 0.0)
    if hasattr(config, "output_router_logits") and coefficient:
        raise ValueError(
            f"model_name_or_path={model.model_name_or_path!r} is a mixture of experts, and TRL would add its "
            f"router's balance loss ({coefficient:g}, of the model's config), but chunked layers hand out no "
            "router logits: write router_aux_loss_coef: 0 to train without it, or chunk_method: none"
        )
    return 0.0
