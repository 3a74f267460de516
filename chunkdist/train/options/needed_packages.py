"""Packages that an option needs: missed before a model is loaded, in one line."""

from __future__ import annotations

import importlib.util
import re
from typing import TYPE_CHECKING, Any

from transformers.integrations import integration_utils
from transformers.utils import import_utils

if TYPE_CHECKING:
    from transformers import TrainingArguments

# By the beginnings of the optimizers' names (transformers 5.23); the package, and what pip calls it.
_OPTIMIZER_PACKAGES = (
    (r"galore_", "galore_torch", "galore-torch"),
    (r"apollo_", "apollo_torch", "apollo-torch"),
    (r"(ada)?lomo$", "lomo_optim", "lomo-optim"),
    (r"grokadamw$", "grokadamw", "grokadamw"),
    (r"schedule_free_", "schedulefree", "schedulefree"),
    (r"stable_adamw$", "optimi", "torch-optimi"),
    (r"adamw_torch_[48]bit$", "torchao", "torchao"),
    (r"adamw_torch_xla$", "torch_xla", "torch_xla"),
    (r"adamw_torch_npu_fused$", "torch_npu", "torch_npu"),
    (r"adamw_anyprecision$", "torchdistx", "torchdistx"),
    (
        r"(adamw_bnb_8bit|adamw_8bit|ademamix|lion_|paged_|rmsprop_bnb)",
        "bitsandbytes",
        "'chunkdist[qlora]'",
    ),
)
_NEEDS_TARGETS = ("galore_", "apollo_")
# Trackers of transformers 5.23 whose package has another name than the option's value.
_TRACKER_PACKAGES = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "azure_ml": ("azureml",),
    "flyte": ("flytekit",),
}
_FLASH = {
    "flash_attention_2": (import_utils.is_flash_attn_2_available, "flash-attn"),
    "flash_attention_3": (import_utils.is_flash_attn_3_available, "flash-attn-3"),
    "flash_attention_4": (import_utils.is_flash_attn_4_available, "flash-attn-4"),
}


def check_packages(training: TrainingArguments) -> None:
    """Refuses optimizers and trackers whose package is not installed.

    Raises:
        ValueError: names the option and the package.
    """
    optimizer = str(getattr(training.optim, "value", training.optim))
    for pattern, package, name in _OPTIMIZER_PACKAGES:
        if re.match(pattern, optimizer) and importlib.util.find_spec(package) is None:
            raise ValueError(f"optim={optimizer} needs {package}: pip install {name}, or write adamw_torch")
    if optimizer.startswith(_NEEDS_TARGETS) and not training.optim_target_modules:
        raise ValueError(
            f"optim={optimizer} needs optim_target_modules: write names of modules, or all-linear"
        )
    trackers: Any = training.report_to
    for tracker in [trackers] if isinstance(trackers, str) else trackers or []:
        known = integration_utils.INTEGRATION_TO_CALLBACK
        if tracker not in known:
            raise ValueError(f"report_to={tracker!r}: write one of {', '.join(sorted(known))}, or none")
        packages = _TRACKER_PACKAGES.get(tracker, (tracker,))
        if all(importlib.util.find_spec(package) is None for package in packages):
            raise ValueError(
                f"report_to={tracker} needs {packages[0]}: pip install {packages[0]}, or write none"
            )


def usable_attention(name: str | None, *, is_chunked: bool) -> tuple[str | None, str | None]:
    """The attention that a model is to be loaded with, and a line to say where that is another one.

    A chunked model attends by its chunks' own kernels, so that a FlashAttention that is not installed is not
    missed; the model's own attention is called outside of training only.

    Raises:
        ValueError: the model would attend by it, and the package is not installed.
    """
    if name not in _FLASH:
        return name, None
    is_available, package = _FLASH[name]
    if is_available():
        return name, None
    if not is_chunked:
        raise ValueError(
            f"attn_implementation={name} with chunk_method=none needs {package}: pip install {package}, or "
            "write sdpa"
        )
    return None, f"attn_implementation={name}: {package} is not usable here; chunks have kernels of their own"
