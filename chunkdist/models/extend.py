"""`extend_context`: a model in memory becomes what its class makes of a config for more tokens.

What follows from the config in a live model is found by building the model's class twice on the meta device,
with the config before and after: attributes that differ are set, and rotary modules are made anew. So nothing
is known here of how a model computes its frequencies, or of what else it scales (DeepSeek's attention).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from chunkdist.errors import UnsupportedModelError
from chunkdist.models.context_length import ContextPlan, Recipe, made_for, plan_context
from chunkdist.models.layers import causal_lm_of

_SET = "_chunkdist_context"
"""Where a model holds its `ContextExtension`."""
_PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True, kw_only=True)
class ContextExtension:
    """What `extend_context` has set.

    Args:
        tokens: Of the longest sequence that the model is set up for.
        before: What it was made for.
        recipe: transformers' `rope_type`, or "none": frequencies have stayed.
        factor: The recipe's; `None` without one.
        why: Why this recipe.
    """

    tokens: int
    before: int
    recipe: str
    factor: float | None
    why: str

    def __str__(self) -> str:
        scaled = "" if self.factor is None else f" by factor {self.factor:g}"
        return f"{self.recipe}{scaled}, from {self.before:,} tokens: {self.why}"


def extend_context(model: nn.Module, tokens: int, *, recipe: Recipe | str = "auto") -> ContextExtension:
    """Sets a causal LM up for sequences of `tokens`, in place: its rotary frequencies, and its config, which
    is saved with it. Before or after `chunk_model` and PEFT; before an engine wraps the model.

    A model is to be trained at that length afterwards: frequencies alone do not make it use distant tokens.

    Args:
        model: A transformers causal LM, or a PEFT model of one.
        recipe: "auto": that of the model's family (Llama 3's, YaRN, linear), or what the model has already.
            "ntk" is transformers' "dynamic". "none": frequencies stay, only the config names the new length.

    Returns:
        What was set; `tokens` and `before` are the same where the model was made for as many.

    Raises:
        ValueError: the recipe does not fit what the model has.
        UnsupportedModelError: the model has no rotary embedding, or one that cannot be scaled.
    """
    causal_lm: Any = causal_lm_of(model)
    name, config = type(causal_lm).__name__, causal_lm.config.get_text_config(decoder=True)
    plan = plan_context(config, tokens, recipe, name=name)
    if plan is None:
        length = made_for(config)
        assert length is not None
        done = ContextExtension(
            tokens=length, before=length, recipe="none", factor=None, why="the model was made for as many"
        )
    else:
        _apply(causal_lm, plan)
        factors = [part.get("factor") for part in _parts(plan.rope_parameters) if part.get("factor")]
        done = ContextExtension(
            tokens=tokens,
            before=plan.before,
            recipe=plan.recipe,
            factor=factors[0] if factors and plan.recipe != "none" else None,
            why=plan.why,
        )
    causal_lm.__dict__[_SET] = done
    return done


def context_extension(model: nn.Module) -> ContextExtension | None:
    """What `extend_context` has set in a model; `None`: it was not called."""
    found: ContextExtension | None = causal_lm_of(model).__dict__.get(_SET)
    return found


def context_length(model: nn.Module) -> int | None:
    """Tokens of the longest sequence that a model was made for, or set up for; `None`: its config does not
    say."""
    return made_for(causal_lm_of(model).config.get_text_config(decoder=True))


def _apply(model: PreTrainedModel, plan: ContextPlan) -> None:
    """All or nothing."""
    config: Any = model.config.get_text_config(decoder=True)
    with_frequencies = {
        path: module
        for path, module in model.named_modules()
        if any(name.endswith("inv_freq") for name, _ in module.named_buffers(recurse=False))
    }
    rotary = {path: x for path, x in with_frequencies.items() if getattr(x, "config", None) is config}
    copied = [
        path for path, x in with_frequencies.items() if type(getattr(x, "config", None)) is type(config)
    ]
    if len(copied) > len(rotary):
        raise UnsupportedModelError(
            f"context_length={plan.tokens}, but {type(model).__name__} makes rotary frequencies of copies of "
            f"its config ({copied[-1]}), which would not follow it: leave context_length out"
        )
    if not rotary:
        raise UnsupportedModelError(
            f"context_length={plan.tokens}, but {type(model).__name__} has no module with rotary "
            "frequencies, though its config has rope_parameters: leave context_length out"
        )
    before = _skeleton(model, plan)
    with _undone_on_failure(config):
        config.rope_parameters = copy.deepcopy(plan.rope_parameters)
        config.max_position_embeddings = plan.max_position_embeddings
        config.standardize_rope_params()
        config.validate_rope()
        changes = _differences(before, _skeleton(model, plan), set(rotary), plan)
        modules = {path: model.get_submodule(path) for path in changes}
        made = {path: _made_anew(module, plan) for path, module in rotary.items()}
    for path, attributes in changes.items():
        modules[path].__dict__.update(copy.deepcopy(attributes))
    for path, fresh in made.items():
        _take_over(rotary[path], fresh)


@contextmanager
def _undone_on_failure(config: Any) -> Iterator[None]:
    before = config.rope_parameters, config.max_position_embeddings
    try:
        yield
    except BaseException:
        config.rope_parameters, config.max_position_embeddings = before
        raise


def _skeleton(model: PreTrainedModel, plan: ContextPlan) -> nn.Module:
    """The model's class without weights, by its config as it is now."""
    try:
        with torch.device("meta"):
            return type(model)(copy.deepcopy(model.config))
    except Exception as error:
        raise _cannot(model, plan, error) from error


def _made_anew(module: nn.Module, plan: ContextPlan) -> nn.Module:
    kind: Any = type(module)
    try:
        with torch.device("cpu"):
            fresh: nn.Module = kind(module.config)
    except Exception as error:
        raise _cannot(module, plan, error) from error
    names = [{name for name, _ in x.named_buffers(recurse=False)} for x in (fresh, module)]
    if names[0] != names[1]:
        raise _cannot(module, plan, ValueError(f"buffers {names[0] ^ names[1]}"))
    return fresh


def _cannot(module: nn.Module, plan: ContextPlan, error: Exception) -> UnsupportedModelError:
    first = str(error).strip().split("\n")[0]
    return UnsupportedModelError(
        f"context_length={plan.tokens} by rope_type={plan.recipe}: {type(module).__name__} cannot be made "
        f"of such a config ({type(error).__name__}: {first}): set that by hand, or leave context_length out"
    )


def _differences(
    before: nn.Module, after: nn.Module, rotary: set[str], plan: ContextPlan
) -> dict[str, dict[str, Any]]:
    """Attributes of modules that are others by the new config, by the module's name, without rotary ones.

    Raises:
        UnsupportedModelError: weights have other shapes.
    """
    changes: dict[str, dict[str, Any]] = {}
    others = dict(after.named_modules())
    for path, module in before.named_modules():
        new = others[path]
        if path in rotary:
            continue
        if _shapes(module) != _shapes(new):
            raise UnsupportedModelError(
                f"context_length={plan.tokens}, but {type(module).__name__} ({path}) has a table of "
                "positions as long as its config says: they are not rotary alone; leave context_length out"
            )
        attributes = {
            key: value
            for key, value in vars(new).items()
            if not key.startswith("_") and _is_plain(value) and vars(module).get(key) != value
        }
        if attributes:
            changes[path] = attributes
    return changes


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return {name: x.shape for name, x in tensors}


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN)


def _take_over(module: nn.Module, fresh: nn.Module) -> None:
    """The numbers of a new module, where the old one's tensors are, and in their dtype."""
    attributes = {key: x for key, x in vars(fresh).items() if not key.startswith("_")}
    module.__dict__.update({key: x for key, x in attributes.items() if key not in ("training", "config")})
    with torch.no_grad():
        for name, buffer in module.named_buffers(recurse=False):
            if not buffer.is_meta:
                buffer.copy_(fresh.get_buffer(name))


def _parts(rope_parameters: dict[str, Any]) -> list[dict[str, Any]]:
    """Sets of parameters, of which a config may have one for each kind of layer."""
    nested = [part for part in rope_parameters.values() if isinstance(part, dict)]
    return nested or [rope_parameters]
