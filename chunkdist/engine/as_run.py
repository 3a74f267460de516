"""What a group's layers were when they ran, so that their rerun in the backward computes the same function.

Without chunks, a backward knows nothing of what was done to the model since the forward: the graph holds the
adapters, hooks and weights that were there. A rerun would meet another adapter, another mode, hooks that are
gone (PEFT and intervention libraries set some for the time of a call), or the model's own weights instead of
those that `torch.func.functional_call` lent it. So all that hangs on the modules is noted when the group has
run: attributes, hooks, submodules, parameters and buffers, by identity; so are the hooks on all modules and
the forwards of the modules' classes. Inside `restored`, what has changed is what it was.

What cannot be put back is refused: weights that were written to. Writes are seen as autograd sees them, by
version; those through `.data`, which have none, by a few numbers of each weight. Engines may put other
storage under a parameter; ZeRO-3 puts other numbers there, and nothing tells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from operator import is_, itemgetter
from types import SimpleNamespace
from typing import Any, NoReturn

import torch
import torch.nn.modules.module as torch_module
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.weak import WeakIdKeyDictionary

from chunkdist.errors import UnsupportedModelError

_PLAIN = (Tensor, nn.Parameter, nn.Buffer)
"""Types whose storage holds their numbers."""
_NUM_SAMPLES = 16
"""Numbers of each weight that are compared."""
_REPLACED_BY_NOBODY = frozenset(vars(nn.Module())) - {
    *("training", "_parameters", "_buffers", "_modules", "_is_full_backward_hook"),
    *("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks"),
}
"""Attributes of every module whose content is looked at, or changes nothing."""
_HOOKS_ON_ALL: Any = SimpleNamespace(
    **{
        name: x
        for name, x in vars(torch_module).items()
        if name.startswith("_global_") and isinstance(x, dict)
    },
    _parameters={},
    _buffers={},
)
"""Stands beside the modules: hooks on every module are in dicts of torch's (2.13)."""
_Contents = tuple[tuple[Any, ...], tuple[Any, ...]]
"""Keys and values of a dict; elements of a list or set."""


class Notes:
    """What was noted of a group's layers last; as a rule it still holds in the next step."""

    def __init__(self) -> None:
        self._last: _Structure | None = None
        self.own_writes: Any = WeakIdKeyDictionary()
        """By tensor, versions that come of the layers' own calls."""

    @contextmanager
    def own_call(self) -> Iterator[None]:
        """Around a call of the layers. PEFT's adapters of parameters (`target_parameters`, 0.21) parametrise
        a weight for the time of a call, which sets it to itself: a version, and no other numbers."""
        tensors = self._last.tensors if self._last is not None and self._last.has_adapted_weights else []
        before = [_version(x) for x in tensors]
        try:
            yield
        finally:
            for x, version in zip(tensors, before, strict=True):
                if passed := _version(x) - version:
                    self.own_writes[x] = self.own_writes.get(x, 0) + passed

    def version(self, x: Tensor) -> int:
        """Another one after a write that is not a call's own."""
        return _version(x) - int(self.own_writes.get(x, 0))

    def __deepcopy__(self, memo: dict[int, Any]) -> Notes:
        return type(self)()

    def take(self, layers: Sequence[nn.Module]) -> LayersAsRun:
        """When the group's forward ends.

        Raises:
            UnsupportedModelError: there is an adapter in the layers that cannot be chunked.
        """
        if self._last is None or not self._last.is_current():
            modules = [module for layer in layers for module in layer.modules()]
            refuse_offset_adapters(modules)
            self._last = _Structure([*modules, _HOOKS_ON_ALL])
        return LayersAsRun(self, self._last, is_sharded=any(isinstance(x, FSDPModule) for x in layers))

    def forget(self) -> None:
        """What is no longer so may hold memory."""
        self._last = None


class LayersAsRun:
    """One forward of a group's layers."""

    def __init__(self, notes: Notes, structure: _Structure, *, is_sharded: bool) -> None:
        self._notes, self._structure = notes, structure
        tensors = structure.tensors
        self._frozen = [x for x in tensors if not x.requires_grad]
        self._versions = [] if is_sharded else [notes.version(x) for x in tensors]
        self._numbers = _numbers(tensors)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Inside, the modules are what they were; afterwards, what they are now.

        Raises:
            UnsupportedModelError: weights or buffers have been written to, or adapters merged into them.
        """
        structure = self._structure
        changed = [] if structure.is_current() else [x for x in structure.states if not x.is_current()]
        kinds: list[Any] = [type(state) for state in changed]
        now = [kind(state.module) for kind, state in zip(kinds, changed, strict=True)]
        thawed = [x for x in self._frozen if x.requires_grad]
        if changed:
            self._notes.forget()
        for state in changed:
            state.refuse_merged()
        try:
            for state in changed:
                state.put_back()
            for x in thawed:
                x.requires_grad_(False)
            self._refuse_written()
            has_other_numbers = _differ(self._numbers, _numbers(structure.tensors))
            yield
            if has_other_numbers():
                _refuse("a weight of the layers has")
        finally:
            for x in thawed:
                x.requires_grad_(True)
            for state in reversed(now):
                state.put_back()

    def _refuse_written(self) -> None:
        tensors = self._structure.tensors
        written = [
            x for x, before in zip(tensors, self._versions, strict=False) if self._notes.version(x) != before
        ]
        for state in self._structure.states if written else ():
            if name := state.name_of(written[0]):
                _refuse(f"{name} of {type(state.module).__name__} has")


class _Structure:
    """What hangs on modules. Compared in a few passes over flat lists: most times nothing has changed."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._classes: tuple[type[nn.Module], ...] = tuple(
            {type(module): None for module in modules if isinstance(module, nn.Module)}
        )
        self._forwards = self._all_forwards()
        self.states: list[_ModuleState | _ClassState] = [_ModuleState(module) for module in modules]
        self.states += [_ClassState(class_) for class_ in self._classes]
        self.tensors = _tensors_of(modules)
        self.has_adapted_weights = any(kind.__name__ == "ParamWrapper" for kind in self._classes)
        self._attributes = [module.__dict__ for module in modules]
        self._getters = [
            itemgetter(*(key for key in x if key not in _REPLACED_BY_NOBODY)) for x in self._attributes
        ]
        self._values = tuple(self._all_values())
        modules_only = [state for state in self.states if isinstance(state, _ModuleState)]
        containers = [container for state in modules_only for container, _ in state.containers]
        self._empty = [x for x in containers if not x]
        self._dicts = [x for x in containers if x and isinstance(x, dict)]
        self._others = [x for x in containers if x and not isinstance(x, dict)]
        self._lengths = self._all_lengths()
        self._contents = tuple(self._all_contents())

    def _all_values(self) -> Iterator[Any]:
        return chain.from_iterable(get(x) for get, x in zip(self._getters, self._attributes, strict=True))

    def _all_forwards(self) -> list[Any]:
        return [kind.forward for kind in self._classes]

    def _all_lengths(self) -> list[int]:
        return [*map(len, self._attributes), *map(len, self._dicts), *map(len, self._others)]

    def _all_contents(self) -> Iterator[Any]:
        in_dicts = chain.from_iterable(map(dict.values, self._dicts))
        return chain(chain.from_iterable(self._dicts), in_dicts, chain.from_iterable(self._others))

    def is_current(self) -> bool:
        try:
            return (
                not any(self._empty)
                and self._all_lengths() == self._lengths
                and all(map(is_, self._all_forwards(), self._forwards))
                and all(map(is_, self._all_values(), self._values))
                and all(map(is_, self._all_contents(), self._contents))
            )
        except KeyError:  # an attribute is gone, and another one has come
            return False


class _ModuleState:
    """What hangs on one module: its attributes, and what is in those that are containers."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        attributes = module.__dict__
        self._keys, self._values = tuple(attributes), tuple(attributes.values())
        containers = [value for value in self._values if isinstance(value, (dict, list, set))]
        self.containers = [(container, _contents(container)) for container in containers]

    def is_current(self) -> bool:
        attributes = self.module.__dict__
        return (
            tuple(attributes) == self._keys
            and all(map(is_, attributes.values(), self._values))
            and all(_same(_contents(container), before) for container, before in self.containers)
        )

    def put_back(self) -> None:
        """Makes the module what it was."""
        attributes = self.module.__dict__
        before = dict(zip(self._keys, self._values, strict=True))
        for key in [key for key in attributes if key not in before]:
            del attributes[key]
        attributes.update(before)
        for container, contents in self.containers:
            if _same(_contents(container), contents):
                continue
            container.clear()
            if isinstance(container, dict):
                container.update(zip(*contents, strict=True))
            elif isinstance(container, list):
                container.extend(contents[0])
            else:
                container.update(contents[0])

    def refuse_merged(self) -> None:
        """Adapters are merged through `.data`, which leaves no version. PEFT (0.21) lists the merged ones."""
        merged = self.module.__dict__.get("merged_adapters")
        before = [contents for container, contents in self.containers if container is merged]
        if merged is not None and (not before or not _same(_contents(merged), before[0])):
            _refuse(f"an adapter of {type(self.module).__name__} has been merged or unmerged: its weight has")

    def name_of(self, x: Tensor) -> str:
        named = {**self.module._parameters, **self.module._buffers}
        return next((name for name, own in named.items() if own is x), "")


class _ClassState:
    """The forward of a class, which some code replaces for all modules of it."""

    def __init__(self, kind: Any) -> None:
        self.module = kind
        self._forward: Any = kind.forward
        self._is_own = "forward" in vars(kind)

    def is_current(self) -> bool:
        return self.module.forward is self._forward

    def put_back(self) -> None:
        if not self._is_own and "forward" in vars(self.module):
            del self.module.forward
        if self.module.forward is not self._forward:
            self.module.forward = self._forward

    def refuse_merged(self) -> None:
        """No adapter is merged into a class."""

    def name_of(self, x: Tensor) -> str:
        return ""


def refuse_offset_adapters(modules: Sequence[nn.Module]) -> None:
    """Raises on adapters that begin at a token, which they count from the end of what they are given."""
    for module in modules:
        for variant in getattr(module.__dict__.get("lora_variant"), "values", tuple)():
            if type(variant).__name__.startswith("ALora") or getattr(variant, "__name__", "").startswith(
                "ALora"
            ):
                raise UnsupportedModelError(
                    "an activated LoRA (alora_invocation_tokens) counts its tokens from the end of the row, "
                    "and would count from the end of each chunk: write a LoRA without alora_invocation_tokens"
                )


def _refuse(what: str) -> NoReturn:
    raise UnsupportedModelError(
        f"{what} been written to between the forward and its backward, and a chunked model runs its layers "
        "again in the backward: call backward before the weights are changed (optimizer.step, merge_adapter, "
        "in-place operations)"
    )


def _contents(container: Any) -> _Contents:
    if isinstance(container, dict):
        return tuple(container), tuple(container.values())
    return tuple(container), ()


def _same(now: _Contents, before: _Contents) -> bool:
    """Values are the same objects; names and numbers, as keys and in lists and sets, may be equal ones."""
    return (
        len(now[0]) == len(before[0])
        and len(now[1]) == len(before[1])
        and all(map(_is_equal, now[0], before[0]))
        and all(map(is_, now[1], before[1]))
    )


def _is_equal(x: Any, y: Any) -> bool:
    return x is y or (isinstance(x, (str, int, float)) and type(x) is type(y) and x == y)


def _tensors_of(modules: Sequence[nn.Module]) -> list[Tensor]:
    """Parameters and buffers with numbers, each once, but those that ZeRO-3 gathers and releases."""
    found: dict[int, Tensor] = {}
    for module in modules:
        for slots in (module._parameters, module._buffers):
            for x in slots.values():
                if x is not None and not hasattr(x, "ds_id"):
                    found[id(x)] = x
    return list(found.values())


def _version(x: Tensor) -> int:
    """Another one after a write in place, but not with other `.data`: engines may move weights."""
    return 0 if x.is_inference() else x._version


def _numbers(tensors: Sequence[Tensor]) -> list[Tensor]:
    """A few numbers of each, spread over it, by device and dtype. They hold no weight's storage."""
    found: dict[Any, list[Tensor]] = {}
    for x in tensors:
        if type(x) in _PLAIN and not x.is_meta and x.is_contiguous() and x.numel():
            num = min(x.numel(), _NUM_SAMPLES)
            view = x.detach().as_strided((num,), (x.numel() // num,), x.storage_offset())
            found.setdefault((x.device, x.dtype), []).append(view)
    return [torch.cat(same).view(torch.uint8) for same in found.values()]


def _differ(before: list[Tensor], now: list[Tensor]) -> Callable[[], bool]:
    """Whether they do, to be asked later: a GPU is not waited for until then."""
    if len(before) != len(now):
        return lambda: True
    answers = [_differs(x, y) for x, y in zip(before, now, strict=True)]
    return lambda: any(answer() for answer in answers)


def _differs(x: Tensor, y: Tensor) -> Callable[[], bool]:
    if x.shape != y.shape:
        return lambda: True
    differs = (x != y).any()
    if not x.is_cuda:
        return lambda: bool(differs)
    answer = torch.empty((), dtype=torch.bool, pin_memory=True)
    answer.copy_(differs, non_blocking=True)
    is_there = torch.cuda.Event()
    is_there.record(torch.cuda.current_stream(x.device))  # layers of a group may be on several devices

    def read() -> bool:
        is_there.synchronize()
        return bool(answer)

    return read
