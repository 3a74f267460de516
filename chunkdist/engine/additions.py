"""What has been put into a decoder layer beside its own modules: hooks, replaced forwards, adapters, modules.

Inside of a chunked layer it is called with one chunk at a time. Code that is not known to treat each token
alone is asked before its gradients count: in its first forward, and again when the set of such code changes.
Forward hooks are compared by themselves (`hook_probe`), all else by the layer that it is in (`probe`). Hooks
on whole layers see the whole sequence.

In every step this costs one look at each module of a layer.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
import torch.nn.modules.module as torch_module
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from chunkdist.engine.hook_probe import Hook, HookNotes
from chunkdist.engine.layer import GroupLayer
from chunkdist.engine.module_probe import ModuleNotes
from chunkdist.engine.probe import TOLERANCE, LayerProbe
from chunkdist.errors import UnsupportedModelError
from chunkdist.models.known_code import is_known_class, is_known_function, makes_weights, name_of
from chunkdist.replay import undisturbed_rng
from chunkdist.stream.stream import Stream

logger = logging.getLogger("chunkdist")

_STRICT_TOLERANCE = 1e-4
_NARROW_TOLERANCE = 3e-2
_MIN_TOKENS = 4
"""With fewer, a probe shows nothing, or little."""
_NUM_KEYS = 8
_HOOKS = (("_forward_pre_hooks", True), ("_forward_hooks", False))
_BACKWARD_HOOKS = ("_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = ("_global_forward_pre_hooks", "_global_forward_hooks", "_global_backward_hooks")
"""Attributes of torch (2.13)."""


@dataclass
class _Found:
    """What is not known in a layer, and a key that changes whenever it does."""

    hooks: list[Hook] = field(default_factory=list)
    code: list[str] = field(default_factory=list)
    modules: list[tuple[nn.Module, str]] = field(default_factory=list)
    """Whose forward is not known, and where they are."""
    observers: list[str] = field(default_factory=list)
    """Backward hooks: they are among `code`, and told of."""
    key: list[Any] = field(default_factory=list)


class Additions:
    """What has been put into one model's layers.

    Args:
        probe: Run on each layer before its first pass; `None`: the model's class is known to be exact, and
            only modules of unknown classes are asked.
    """

    def __init__(self, probe: LayerProbe | None = None) -> None:
        self.probe = probe
        self._asks_classes = probe is None
        self._classes: dict[tuple[type, type, bool], bool] = {}
        self._functions: dict[int, tuple[Any, bool]] = {}
        """By id, as long as the function lives: it may be one step's, and hold tensors."""
        self._passed: WeakKeyDictionary[GroupLayer, list[tuple[tuple[Any, ...], int]]] = WeakKeyDictionary()
        """The keys of what has been asked last, and with how many tokens a row: training and evaluation take
        turns."""
        self._told: set[str] = set()

    def __deepcopy__(self, memo: dict[int, Any]) -> Additions:
        return Additions(copy.deepcopy(self.probe, memo))

    @contextmanager
    def asked(
        self,
        layers: Sequence[GroupLayer],
        arguments: Sequence[dict[str, Any]],
        hidden: Tensor,
        stream: Stream,
        row_tokens: int,
    ) -> Iterator[None]:
        """Inside, the layers run for the first time with what is not known in them, or for the first time
        with rows of so many tokens.

        Args:
            row_tokens: What the layers would be called with without chunks.

        Raises:
            UnsupportedModelError: it does not treat each token alone.
        """
        if hidden.is_meta or isinstance(hidden, FakeTensor):
            yield
            return
        if self.probe is not None:
            for layer, given in zip(layers, arguments, strict=True):
                if layer.state is not None:
                    self.probe.check(layer, hidden, given, stream)
        if len(layers) > 1:
            self._refuse_between(layers)
        notes: list[tuple[GroupLayer, _Found, list[HookNotes]]] = []
        modules: list[ModuleNotes] = []
        with ExitStack() as stack:
            for layer, given in zip(layers, arguments, strict=True):
                found = self._look(layer)
                if not found.key or self._has_passed(layer, found, row_tokens):
                    continue
                found = self._look(layer, with_paths=True)
                self._ask_layer(layer, given, hidden, stream, found)
                num_tokens = partial(_num_tokens, layer)
                own = [HookNotes(hook, layer.layer, num_tokens, row_tokens) for hook in found.hooks]
                found_modules = {module: path for module, path in found.modules if module is not layer.layer}
                modules += [ModuleNotes(*of, layer, row_tokens) for of in found_modules.items()]
                for note in own:
                    stack.enter_context(note.in_place())
                notes.append((layer, found, own))
            for module in modules:
                stack.enter_context(module.in_place())
            yield
        with undisturbed_rng(hidden):
            for module in modules:
                module.check()
        for layer, found, own in notes:
            if self._ask_hooks(own, hidden) and hidden.shape[1] >= _MIN_TOKENS:
                passed = self._passed.setdefault(layer, [])
                passed[_NUM_KEYS:] = []
                passed.insert(0, ((*found.key, torch.is_grad_enabled()), row_tokens))
            self._tell(layer, found, own)

    def _refuse_between(self, layers: Sequence[GroupLayer]) -> None:
        """Raises on hooks on whole layers that would be called with what no group begins or ends with."""
        for layer in layers:
            if layer.state is None:
                continue
            kinds = ["_backward_hooks"]
            kinds += ["_forward_pre_hooks"] if layer is not layers[0] else []
            kinds += ["_forward_hooks", "_backward_pre_hooks"] if layer is not layers[-1] else []
            for kind in kinds:
                for function in layer.layer.__dict__[kind].values():
                    if not self._is_known(function):
                        raise UnsupportedModelError(
                            f"the hook {name_of(function)} on {layer.state.name} is to see what its layer "
                            f"gets or returns, and inside of a group of {len(layers)} layers that exists for "
                            "one chunk at a time only: write layers_per_group=1"
                        )

    def _has_passed(self, layer: GroupLayer, found: _Found, row_tokens: int) -> bool:
        """With gradients, or, where there are none, without."""
        keys = [(*found.key, True), (*found.key, torch.is_grad_enabled())]
        return any(key in keys and row_tokens <= asked for key, asked in self._passed.get(layer, ()))

    def _look(self, layer: GroupLayer, *, with_paths: bool = False) -> _Found:
        found, state = _Found(), layer.state
        if state is None:
            return found
        root, kind = layer.layer, type(layer.layer)
        for module in root.modules():
            own = module.__dict__
            known = self._classes.get((type(module), kind, state.mixes))
            if known is None:
                known = is_known_class(type(module), root, mixes=state.mixes)
                self._classes[type(module), kind, state.mixes] = known
            forward = layer.original_forward if module is root else own.get("forward")
            is_set = forward is not None and getattr(forward, "__func__", None) is not type(module).forward
            if known and not is_set and not self._is_known(type(module).forward):  # set on the class
                forward, is_set = type(module).forward, True
            has_hooks = module is not root and (
                own["_forward_hooks"]
                or own["_forward_pre_hooks"]
                or own["_backward_hooks"]
                or own["_backward_pre_hooks"]
            )
            if known and not is_set and not has_hooks and "_hf_hook" not in own:
                continue
            path = ""
            if with_paths:
                path = next(name for name, other in root.named_modules() if other is module)
                path = f"{path or 'the whole'} of {state.name}"
            self._note(found, layer, module, path, known=known, forward=forward if is_set else None)
        for name in _GLOBAL_HOOKS:
            for key, function in getattr(torch_module, name).items():
                if not self._is_known(function):
                    found.code.append(f"the global hook {name_of(function)}")
                    found.observers.append(found.code[-1])
                    found.key.append(key)
        return found

    def _note(
        self,
        found: _Found,
        layer: GroupLayer,
        module: nn.Module,
        path: str,
        *,
        known: bool,
        forward: Any,
    ) -> None:
        if not known and self._asks_classes:
            found.code.append(f"{type(module).__module__}.{type(module).__name__}, {path}")
            found.modules.append((module, found.code[-1]))
            found.key += [ref(module), type(module), module.training]
        if forward is not None and not self._is_known(forward):
            found.code.append(f"the forward {name_of(forward)} that was set on {path}")
            found.modules.append((module, found.code[-1]))
            found.key += [ref(module), forward]
        hf_hook = module.__dict__.get("_hf_hook")
        for hook in getattr(hf_hook, "hooks", (hf_hook,)) if hf_hook is not None else ():
            if not type(hook).__module__.startswith("accelerate."):
                found.code.append(f"accelerate's hook {type(hook).__name__} on {path}")
                found.key.append(hook)
        if module is layer.layer:
            return
        for attribute, is_pre in _HOOKS:
            slots = module.__dict__[attribute]
            for key, function in slots.items():
                if self._is_known(function):
                    continue
                if makes_weights(function):
                    found.code.append(f"{name_of(function)} on {path}")
                else:
                    found.hooks.append(Hook(module, path, slots, key, is_pre, function))
                found.key += [key, module.training]
        for attribute in _BACKWARD_HOOKS:
            for key, function in module.__dict__[attribute].items():
                if not self._is_known(function):
                    found.code.append(f"the backward hook {name_of(function)} on {path}")
                    found.observers.append(found.code[-1])
                    found.key.append(key)

    def _is_known(self, function: Any) -> bool:
        functions, key = self._functions, id(function)
        if key not in functions:
            is_known = is_known_function(function)
            try:
                functions[key] = ref(function, lambda _: functions.pop(key, None)), is_known
            except TypeError:  # an object with slots: its id may be another one's soon
                return is_known
        return functions[key][1]

    def _ask_layer(
        self,
        layer: GroupLayer,
        arguments: dict[str, Any],
        hidden: Tensor,
        stream: Stream,
        found: _Found,
    ) -> None:
        if self.probe is not None:
            self.probe.passed.discard(layer.layer)  # its modules may have changed
            self.probe.check(layer, hidden, arguments, stream)
        if not found.code:
            return
        is_exact = hidden.device.type == "cpu" and all(
            p.is_floating_point() for p in layer.layer.parameters()
        )
        tolerance = _STRICT_TOLERANCE if is_exact else TOLERANCE
        call = (layer, hidden, arguments, stream)
        try:
            try:
                LayerProbe(tolerance=tolerance, moves_weights=True).check(*call)
            except RuntimeError:  # tensors of its own are in another dtype than the probe
                LayerProbe(tolerance=_NARROW_TOLERANCE, moves_weights=True, widens=False).check(*call)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(
                f"{error}. It has {'; '.join(found.code[:3])}: what looks at other tokens, or draws random "
                "numbers of its own, cannot be chunked inside of a layer"
            ) from error

    def _ask_hooks(self, notes: list[HookNotes], hidden: Tensor) -> bool:
        """Whether all of them have been compared with an effect."""
        shown = True
        with undisturbed_rng(hidden):
            for note in notes:
                shown &= note.check()
        return shown

    def _tell(self, layer: GroupLayer, found: _Found, notes: list[HookNotes]) -> None:
        if not layer.layer.training or not torch.is_grad_enabled():
            return
        watching = [note.hook.describe() for note in notes if note.only_looks]
        for what in [*watching, *found.observers]:
            if what not in self._told:  # by name: a hook may be put there anew in each step
                self._told.add(what)
                logger.warning(
                    "chunkdist: %s sees one chunk at a time, without a graph, and again in the backward: a "
                    "loss of what it keeps has no gradient; a hook on a whole layer sees the whole sequence, "
                    "with its graph",
                    what,
                )


def _num_tokens(layer: GroupLayer) -> int:
    cell = None if layer.state is None else layer.state.cell
    return 0 if cell is None else cell.chunk.num_tokens
