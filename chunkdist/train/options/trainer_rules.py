"""Values of the options that DPO, Reward and GRPO have beside SFT's: TRL (1.16) takes any number and any
word, and fails in its first step, or trains NaN, or away from the data."""

from __future__ import annotations

import difflib
from argparse import Namespace
from typing import Any

from transformers import GenerationConfig

from chunkdist.train.options.json_options import read_json
from chunkdist.train.options.rules import COUNT, NOT_NEGATIVE, POSITIVE, Range

_SHARE = Range(low=0, high=1)

RANGES: dict[str, Range] = {
    "beta": NOT_NEGATIVE,
    "label_smoothing": Range(low=0, high=0.5, has_high=False),
    "ld_alpha": _SHARE,
    "discopop_tau": POSITIVE,
    "f_alpha_divergence_coef": POSITIVE,
    "precompute_ref_batch_size": COUNT,
    "ref_model_mixup_alpha": _SHARE,
    "ref_model_sync_steps": COUNT,
    "center_rewards_coefficient": NOT_NEGATIVE,
    "num_generations": Range(low=2, or_word=": completions are compared with each other"),
    "num_generations_eval": COUNT,
    "max_completion_length": COUNT,
    "generation_batch_size": COUNT,
    "steps_per_generation": COUNT,
    "num_iterations": COUNT,
    "temperature": POSITIVE,
    "top_p": Range(low=0, high=1, has_low=False),
    "top_k": Range(low=0, or_word="; 0 is no limit"),
    "min_p": _SHARE,
    "repetition_penalty": POSITIVE,
    "epsilon": NOT_NEGATIVE,
    "epsilon_high": NOT_NEGATIVE,
    "delta": POSITIVE,
    "top_entropy_quantile": _SHARE,
    "sapo_temperature_neg": POSITIVE,
    "sapo_temperature_pos": POSITIVE,
}
WORDS: dict[tuple[str, str], tuple[str, ...]] = {
    ("dpo", "loss_type"): (
        *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot"),
        *("aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
    ),
    ("dpo", "f_divergence_type"): ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"),
    ("grpo", "loss_type"): ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "luspo", "sapo", "vespo"),
    ("grpo", "scale_rewards"): ("group", "batch", "none"),
    ("grpo", "importance_sampling_level"): ("token", "sequence"),
}


def check_trainer_values(values: Namespace, given: set[str], kind: str) -> None:
    """Refuses what a trainer cannot take.

    Args:
        given: Names of the options that the user has written.

    Raises:
        ValueError: names the option, its value, and what to write.
    """
    if kind == "sft":
        return
    for name in sorted(given & set(RANGES)):
        value, allowed = getattr(values, name, None), RANGES[name]
        if isinstance(value, int | float) and not isinstance(value, bool) and not allowed.holds(value):
            raise ValueError(f"{name}={value}: {allowed.wanted()}")
    for (of_kind, name), words in WORDS.items():
        found = getattr(values, name, None)
        for word in found if isinstance(found, list) else [found]:
            is_written = of_kind == kind and name in given and isinstance(word, str)
            if is_written and word not in words:
                raise ValueError(f"{name}={word!r}: write one of {', '.join(words)}")
    generation = getattr(values, "generation_kwargs", None)
    if generation and not values.use_vllm:  # vLLM refuses what it does not know
        _check_generation(generation)


def _check_generation(given: Any) -> None:
    """transformers (5.23) takes any key for one of a model of its own, and generates without it."""
    name, known = "generation_kwargs", [key for key in vars(GenerationConfig()) if not key.startswith("_")]
    for key in read_json(given, where=name) if isinstance(given, str) else given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            advice = f"write {near[0]}" if near else "write a name of transformers' GenerationConfig"
            raise ValueError(f"{name} has {key!r}, which generation does not know: {advice}, or leave it out")
