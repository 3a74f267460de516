"""The logits of a forward with labels: a tensor without storage, which is made when somebody needs it.

It is made once, by a call of the output layer, and is then an ordinary tensor that is kept: writes stay,
gradients flow. From outside it is the plain model's, or an error: it is bound to the weights of its forward,
and what would need the loss to be computed from it is refused, as the loss is not.

C++ code and autograd functions do not ask `__torch_function__`. For them the tensor has a node of its own in
the graph, at which a gradient ends in an error.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from chunkdist.loss.cross_entropy import Operation, logits_of
from chunkdist.loss.head_hooks import ENGINES, foreign_hook, made_by
from chunkdist.loss.lazy_forward import INSTEAD, UNREACHABLE_NODE, LazyForward, Unreachable
from chunkdist.loss.weight_witness import WeightWitness
from chunkdist.replay import AutocastState

_T = torch.Tensor
_ELEMENTWISE = frozenset(
    {_T.div, _T.true_divide, _T.__truediv__, torch.div, _T.mul, _T.__mul__, _T.__rmul__, torch.mul}
    | {_T.tanh, torch.tanh, _T.float, _T.to, _T.contiguous}
)
_CASTS = frozenset({_T.float, _T.to, _T.contiguous})
_PROPERTIES = (
    "shape", "dtype", "device", "ndim", "requires_grad", "grad_fn", "is_leaf", "layout", "is_cuda", "_base",
)  # fmt: skip
_METADATA = frozenset(
    {_T.size, _T.dim, _T.numel, _T.__len__, _T.is_floating_point, _T.is_contiguous}
    | {getattr(_T, name).__get__ for name in _PROPERTIES}
)
_DETACH = frozenset({_T.detach, torch.detach})
_CLONE = frozenset({_T.clone, torch.clone})
_OBSERVE = frozenset(
    {_T.retain_grad, _T.register_hook, _T.register_post_accumulate_grad_hook, torch.autograd.grad}
)
_SAME = frozenset({torch.ops.aten.detach.default, torch.ops.aten.alias.default})
_PASS_ON = (*ENGINES, "torch.nn.parallel.")
"""Modules of autograd functions that hand on what they are given, and its gradient."""


class LazyLogits(torch.Tensor):
    """`head(hidden)` and the operations after it: (B, T, V).

    Args:
        hidden: (B, T, H).
        head: H to V.
        operations: Elementwise, in their order.
        dtype: The result's dtype.
    """

    hidden: Tensor
    head: nn.Linear
    operations: tuple[Operation, ...]
    autocast: AutocastState
    """Autocast of the forward; the logits may be made after it."""
    forward_run: LazyForward
    parent: LazyLogits | None
    """The logits that these are, after `change`; `None`: these are the head's."""
    change: Operation | None
    value: Tensor | None
    """These logits, once they are made."""
    hooks: OrderedDict[int, Any]
    """Engines' hooks on the gradient, waiting for `value`."""
    copies: list[weakref.ref[LazyLogits]]
    """Made of these by a `change`, and not computed yet."""

    @classmethod
    def of_head(cls, hidden: Tensor, head: nn.Linear, run: LazyForward) -> LazyLogits:
        device_type = hidden.device.type
        is_mixed = torch.is_autocast_enabled(device_type)
        dtype = torch.get_autocast_dtype(device_type) if is_mixed else hidden.dtype
        tensors = (hidden, *head.parameters())
        if run.witness is None:
            run.witness = WeightWitness.of(tensors)
        autocast = AutocastState.capture(device_type)
        connected = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
        return cls._make(hidden, head, (), dtype, autocast, run, connected=connected)

    @classmethod
    def _make(
        cls,
        hidden: Tensor,
        head: nn.Linear,
        operations: tuple[Operation, ...],
        dtype: torch.dtype,
        autocast: AutocastState,
        run: LazyForward,
        *,
        parent: LazyLogits | None = None,
        change: Operation | None = None,
        connected: bool = False,
    ) -> LazyLogits:
        def make() -> LazyLogits:
            shape = (*hidden.shape[:-1], head.out_features)  # the weight may be sharded
            lazy: LazyLogits = torch.Tensor._make_wrapper_subclass(
                cls, shape, dtype=dtype, device=hidden.device
            )
            lazy.hidden, lazy.head, lazy.operations, lazy.autocast = hidden, head, operations, autocast
            lazy.forward_run, lazy.parent, lazy.change, lazy.value = run, parent, change, None
            lazy.hooks, lazy.copies = OrderedDict(), []
            return lazy

        if not connected:
            return make()
        with torch.enable_grad():
            lazy: LazyLogits = Unreachable.apply(torch.zeros((), requires_grad=True), make)  # type: ignore[no-untyped-call]
        return lazy

    def for_tiles(self) -> LazyLogits | None:
        """What a loss may compute tile by tile; `None`: the values are there, or no gradient is to flow."""
        lazy = self
        while lazy.parent is not None and lazy.change is None and lazy.value is None:
            lazy = lazy.parent
        connected = self._is_connected() or not lazy._is_connected()
        return lazy if connected and lazy.value is None and lazy.parent is None else None

    def materialize(self) -> Tensor:
        """The logits, made once.

        Raises:
            RuntimeError: they cannot be the forward's any more.
        """
        if self.value is None:
            connected = self._is_connected()
            with torch.inference_mode(False), torch.set_grad_enabled(connected), self.autocast.apply():
                if self.parent is None:
                    value = self._run_head()
                else:
                    value = self.parent.materialize()
                    value = value if self.change is None else self.change(value)
            self.value = value if connected or not value.requires_grad else value.detach()
            self.parent = None
            if self.value.requires_grad:
                for hook in self.hooks.values():
                    self.value.register_hook(hook)
            for copy in (reference() for reference in self.copies):
                if copy is not None:  # before anybody writes here
                    copy.materialize()
            self.copies = []
        return self.value

    def _run_head(self) -> Tensor:
        run = self.forward_run
        if not run.is_running:
            assert run.witness is not None
            if not run.witness.still_holds((self.hidden, *self.head.parameters())):
                raise RuntimeError(
                    "outputs.logits of a chunked model are made when they are first read, and since their "
                    "forward the output layer's weights were written to or released (optimizer.step() does): "
                    "read outputs.logits before, or call the model without labels"
                )
            hook = foreign_hook([run.outer, self.head])
            if hook is not None:
                raise RuntimeError(
                    f"outputs.logits of a chunked model are made when they are first read, and since their "
                    f"forward a hook, {hook}, was put on the output layer: read outputs.logits before"
                )
        return self.call_head(
            lambda hidden: logits_of(hidden, self.head.weight, self.head.bias, operations=self.operations)
        )

    def call_head(self, function: Operation) -> Tensor:
        """Calls the output layer on the hidden states, hooks and all, with `function` as the head's
        forward."""
        before = self.head.__dict__.get("forward")
        calls = 0

        def counted(hidden: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return function(hidden)

        try:
            self.head.__dict__["forward"] = counted
            result: Tensor = self.forward_run.outer._call_impl(self.hidden)
        finally:
            if before is None:
                del self.head.__dict__["forward"]
            else:
                self.head.__dict__["forward"] = before
        if calls != 1:
            raise RuntimeError(
                "since the forward of a chunked model another output layer has become active (PEFT's "
                "adapters switch it): read outputs.logits before"
            )
        return result

    def _is_connected(self) -> bool:
        """Whether these logits are part of the graph: as C++ sees it, through engines' functions.

        Raises:
            RuntimeError: another function has passed them on, and its backward would be left out.
        """
        with torch._C.DisableTorchFunctionSubclass():
            waiting: list[Any] = [self.grad_fn]
        foreign = ""
        while waiting:
            node = waiting.pop()
            if isinstance(node, UNREACHABLE_NODE):
                return True
            function = getattr(type(node), "_forward_cls", None)  # of a function in Python (torch 2.13)
            is_static_ddp = hasattr(node, "ddp_weakref") and node.ddp_weakref().static_graph
            if function is not None and (is_static_ddp or not made_by(function, _PASS_ON)):
                foreign = function.__name__
            elif node is not None:  # an engine's may hand on the loss, too
                waiting.extend(before for before, _ in node.next_functions)
        if foreign:
            raise RuntimeError(
                f"outputs.logits of a chunked model went through {foreign} before they were made, whose "
                f"backward would be left out: {INSTEAD}"
            )
        return False

    def _twin(self, change: Operation | None, dtype: torch.dtype, *, connected: bool) -> LazyLogits:
        """These logits under another name, or changed; not a part of the graph unless a function that made
        it puts it there."""
        twin = self._make(
            self.hidden, self.head, self.operations, dtype, self.autocast, self.forward_run,
            parent=self, change=change, connected=connected,
        )  # fmt: skip
        if change is not None:
            self.copies.append(weakref.ref(twin))
        return twin

    def _changed(self, operation: Operation, dtype: torch.dtype) -> LazyLogits:
        """The same as `operation(self)`, which is elementwise and gives `dtype`."""
        root = self.for_tiles()
        if not self.forward_run.is_running or root is None:
            return self._twin(operation, dtype, connected=self._is_connected())
        operations = (*root.operations, operation)
        return self._make(
            root.hidden, root.head, operations, dtype, root.autocast, root.forward_run,
            connected=self._is_connected(),
        )  # fmt: skip

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        lazy, *others = args or (None,)
        if isinstance(lazy, LazyLogits) and lazy.value is None:
            if func in _METADATA or func in _DETACH or (func in _CLONE and not torch.is_grad_enabled()):
                with torch._C.DisableTorchFunctionSubclass():
                    return func(*args, **kwargs)
            is_lazy = func in _CASTS or (func in _ELEMENTWISE and lazy.forward_run.is_running)
            if is_lazy and not any(isinstance(x, Tensor) for x in (*others, *kwargs.values())):
                operation: Operation = lambda logits: func(logits, *others, **kwargs)  # noqa: E731
                like = torch.empty(0, dtype=lazy.dtype, device=lazy.device)
                result = operation(like)
                if result is like:  # so are the logits then, and who writes into one writes into the other
                    return lazy
                if result.device == lazy.device:
                    return lazy._changed(operation, result.dtype)
        hooks = [*others, *kwargs.values()] if func is _T.register_hook else []
        if isinstance(lazy, LazyLogits) and hooks and made_by(hooks[0], ENGINES):
            if lazy.value is not None:
                return lazy.value.register_hook(hooks[0])
            handle = RemovableHandle(lazy.hooks)
            lazy.hooks[handle.id] = hooks[0]
            return handle
        if func in _OBSERVE:
            _observe(func.__name__, args, kwargs)
        return func(*computed(args), **computed(kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        # What C++ calls without asking __torch_function__.
        lazy = args[0] if args else None
        if isinstance(lazy, LazyLogits) and lazy.value is None:
            is_view = func is torch.ops.aten.view.default and tuple(args[1]) == tuple(lazy.shape)
            if func in _SAME or is_view:
                return lazy._twin(None, lazy.dtype, connected=False)
            if func is torch.ops.aten.clone.default:
                return lazy._twin(torch.clone, lazy.dtype, connected=False)
        return func(*computed(args), **computed(kwargs or {}))


def computed(x: Any) -> Any:
    """`x` with the real logits in the places of lazy ones."""
    if isinstance(x, LazyLogits):
        return x.materialize()
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return type(x)(*map(computed, x))
    if isinstance(x, (list, tuple)):
        return type(x)(computed(item) for item in x)
    if isinstance(x, dict):
        return {key: computed(item) for key, item in x.items()}
    return x


def _observe(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Notes for each of the lazy logits that somebody waits for their gradient."""
    waiting = [*args, *kwargs.values()]
    while waiting:
        x = waiting.pop()
        if isinstance(x, LazyLogits):
            x.forward_run.observed.name = name
        elif isinstance(x, (list, tuple)):
            waiting.extend(x)
