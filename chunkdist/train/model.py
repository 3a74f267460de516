"""The model of a run, loaded or drawn, and what a trainer is to put around it."""

from __future__ import annotations

from typing import Any

import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, set_seed
from trl import get_peft_config, get_quantization_config

from chunkdist.models.extend import extend_context
from chunkdist.sharding.zero3 import whole_weights
from chunkdist.train.adapter_names import refuse_unknown_names
from chunkdist.train.checkpoints.initial_weights import load_model
from chunkdist.train.launch.faults import asked_by
from chunkdist.train.launch.output import first_line
from chunkdist.train.options.arguments import TrainingOptions
from chunkdist.train.options.needed_packages import usable_attention

_HEADS = ("score.", "lm_head.")
"""What a reward model has in the place of what a causal LM has."""


def model_parts(options: TrainingOptions, *, is_chunked: bool, has_weights: bool = True) -> dict[str, Any]:
    """The model, and the configs of adapters and quantisation, by the names of a trainer's arguments.

    Args:
        has_weights: False: the model is on the meta device, its adapters in it.

    Raises:
        ValueError: the model cannot be made; says which option is at fault.
    """
    training, given = options.training, options.model
    is_reward = options.kind == "reward"
    with asked_by("use_peft", "lora_target_modules", "load_in_4bit", "load_in_8bit"):
        adapters, quantization = get_peft_config(given), get_quantization_config(given)
    if not has_weights:
        given.attn_implementation = None  # nothing will attend
        with torch.device("meta"):
            model = with_context(_from_scratch(options), options)
            refuse_unknown_names(model, adapters)
            model = model if adapters is None else get_peft_model(model, adapters)
        return {"model": model, "quantization_config": None, "peft_config": None}
    if given.from_scratch:
        return {
            "model": with_context(_from_scratch(options), options),
            "quantization_config": quantization,
            "peft_config": adapters,
        }
    values = dict(training.model_init_kwargs) if isinstance(training.model_init_kwargs, dict) else {}
    if "attn_implementation" in values:
        values["attn_implementation"], _ = usable_attention(
            values["attn_implementation"], is_chunked=is_chunked
        )
    set_seed(training.seed)
    if quantization is not None and "quantization_config" in values:
        raise ValueError(
            "load_in_4bit and model_init_kwargs.quantization_config are both set: write one of them"
        )
    values = {
        "revision": given.model_revision,
        "attn_implementation": given.attn_implementation,
        "dtype": given.dtype,
        "device_map": None,  # the trainer places the model; "auto" might leave layers on the host unasked
        "quantization_config": quantization,
        "trust_remote_code": training.trust_remote_code,
        **values,
    }
    if is_reward:
        values |= {"architecture": AutoModelForSequenceClassification, "num_labels": 1}
    model = load_model(
        str(given.model_name_or_path),
        allow_missing=given.allow_missing_weights,
        replaced=_HEADS if is_reward else (),
        hf_deepspeed_config=getattr(training, "hf_deepspeed_config", None),
        **values,
    )
    model = with_context(model, options)
    refuse_unknown_names(model, adapters)
    return {"model": model, "quantization_config": None, "peft_config": adapters}


def with_context(model: Any, options: TrainingOptions) -> Any:
    """The model, set up for `context_length`.

    Raises:
        ValueError: that cannot be done.
    """
    given = options.model
    if given.context_length is not None:
        extend_context(model, given.context_length, recipe=given.rope_extension)
    return model


def _from_scratch(options: TrainingOptions) -> Any:
    name, is_reward = str(options.model.model_name_or_path), options.kind == "reward"
    try:
        config = AutoConfig.from_pretrained(
            name,
            revision=options.model.model_revision,
            trust_remote_code=options.training.trust_remote_code,
            **({"num_labels": 1} if is_reward else {}),
        )
    except Exception as error:  # transformers checks values in its own way
        raise ValueError(f"model_name_or_path={name!r} gives no config: {first_line(error)}") from error
    set_seed(options.training.seed)
    dtype = options.model.dtype
    kind: Any = AutoModelForSequenceClassification if is_reward else AutoModelForCausalLM
    asked = asked_by(f"model_name_or_path={name!r}", "attn_implementation")
    with asked, whole_weights(getattr(options.training, "hf_deepspeed_config", None)):
        return kind.from_config(
            config,
            dtype=None if dtype in (None, "auto") else getattr(torch, str(dtype)),
            attn_implementation=options.model.attn_implementation,
            trust_remote_code=options.training.trust_remote_code,
        )
