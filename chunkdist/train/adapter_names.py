"""Names of modules and parameters that an adapter is to train: PEFT (0.21) passes over those that it does not
find, except in `target_modules`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

_NUM_NAMED = 6


def refuse_unknown_names(model: Any, config: Any) -> None:
    """Raises where a name matches nothing in the model.

    Args:
        model: The one that adapters will be put into.
        config: PEFT's `LoraConfig`; `None`: there are no adapters.

    Raises:
        ValueError: names the option, and some names that there are.
    """
    if config is None:
        return
    modules = [name for name, _ in model.named_modules() if name]
    parameters = [name for name, _ in model.named_parameters()]
    for name in config.modules_to_save or ():
        if not any(module.endswith(name) for module in modules):  # PEFT's own rule
            raise ValueError(_line("lora_modules_to_save", "module", name, modules))
    for name in config.target_parameters or ():
        if not any(f".{parameter}".endswith(f".{name}") for parameter in parameters):
            raise ValueError(_line("lora_target_parameters", "parameter", name, parameters))


def _line(option: str, kind: str, name: str, known: Iterable[str]) -> str:
    """What is wrong with a name; those that are like it come first."""
    size = 1 if kind == "module" else 2
    short = list(dict.fromkeys(".".join(full.split(".")[-size:]) for full in known))
    short = [text for text in short if not text.isdecimal()]
    near = difflib.get_close_matches(name, short, n=3, cutoff=0.4)
    named = [*near, *(text for text in short if text not in near)][:_NUM_NAMED]
    return f"{option}: the model has no {kind} {name!r}: write one of its names, as {', '.join(named)}"
