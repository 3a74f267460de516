"""Linear cross-entropy in tiles: the logits of a whole sequence never exist.

A causal LM computes `logits = head(hidden)`, changes them (soft-cap, scale, `.float()`), and hands them to
its loss function. During a forward with labels, the head returns `LazyLogits` instead: a tensor without
storage that writes down the elementwise operations and is computed when somebody needs it. The loss function
takes it tile by tile, gradients included, so that the head runs once (as in Liger, arXiv 2410.10989, section
3.2).

The head is called when its weights are needed, not before: what it does then stands in for its forward, and
the hooks of sharding engines gather, release and reduce around that call as they would around any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from chunkdist.loss.cross_entropy import Operation, linear_cross_entropy, logits_of
from chunkdist.recovery import attempt, no_loss
from chunkdist.replay import AutocastState

_T = torch.Tensor
_ELEMENTWISE = frozenset(
    {_T.div, _T.true_divide, _T.__truediv__, torch.div, _T.mul, _T.__mul__, _T.__rmul__, torch.mul}
    | {_T.tanh, torch.tanh, _T.float, _T.to, _T.contiguous}
)
_PROPERTIES = ("shape", "dtype", "device", "ndim", "requires_grad", "grad_fn", "is_cuda")
_METADATA = frozenset(
    {_T.size, _T.dim, _T.numel, _T.__len__, _T.is_floating_point}
    | {getattr(_T, name).__get__ for name in _PROPERTIES}
)


class LazyLogits(torch.Tensor):
    """`head(hidden)` and the operations after it, not computed yet: (B, T, V). Whatever else is asked of it
    computes it.

    Args:
        hidden: (B, T, H).
        head: H to V.
        operations: Elementwise, in their order.
        dtype: Of the result.
        detached: Whether the logits are no part of the graph: DeepSpeed's hooks detach what a model returns.
    """

    hidden: Tensor
    head: nn.Linear
    operations: tuple[Operation, ...]
    detached: bool
    autocast: AutocastState
    """Of the forward; `compute` may be called after it."""

    @staticmethod
    def __new__(
        cls,
        hidden: Tensor,
        head: nn.Linear,
        operations: tuple[Operation, ...],
        dtype: torch.dtype,
        detached: bool = False,
    ) -> LazyLogits:
        shape = (*hidden.shape[:-1], head.out_features)  # the weight may be sharded
        self: LazyLogits = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=hidden.device)
        self.hidden, self.head, self.operations, self.detached = hidden, head, operations, detached
        self.autocast = AutocastState.capture(hidden.device.type)
        return self

    def with_changes(
        self, *, operations: tuple[Operation, ...], dtype: torch.dtype, detached: bool
    ) -> LazyLogits:
        """The same logits, with other operations or without the graph."""
        hidden = self.hidden.detach() if detached else self.hidden
        twin = LazyLogits(hidden, self.head, operations, dtype, detached)
        twin.autocast = self.autocast
        return twin

    def compute(self) -> Tensor:
        """The logits as a tensor, connected to the graph unless they are detached."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.detached), self.autocast.apply():
            return self.call_head(
                lambda hidden: logits_of(hidden, self.head.weight, self.head.bias, operations=self.operations)
            )

    def call_head(self, function: Operation) -> Tensor:
        """Calls the head on the hidden states, hooks and all, with `function` as its forward."""
        before = self.head.__dict__.get("forward")
        try:
            self.head.__dict__["forward"] = function
            result: Tensor = self.head._call_impl(self.hidden)
        finally:
            if before is None:
                del self.head.__dict__["forward"]
            else:
                self.head.__dict__["forward"] = before
        return result

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        lazy, *others = args or (None,)
        if (
            isinstance(lazy, LazyLogits)
            and func in _ELEMENTWISE
            and not any(isinstance(x, Tensor) for x in (*others, *kwargs.values()))
        ):
            operation: Operation = lambda logits: func(logits, *others, **kwargs)  # noqa: E731
            dtype = operation(torch.empty(0, dtype=lazy.dtype)).dtype
            operations = (*lazy.operations, operation)
            return lazy.with_changes(operations=operations, dtype=dtype, detached=lazy.detached)
        if isinstance(lazy, LazyLogits) and func in (_T.detach, torch.detach):
            return lazy.with_changes(operations=lazy.operations, dtype=lazy.dtype, detached=True)
        return func(*_computed(args), **_computed(kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        # What C++ calls without asking __torch_function__.
        return func(*_computed(args), **_computed(kwargs or {}))


def _computed(x: Any) -> Any:
    if isinstance(x, LazyLogits):
        return x.compute()
    if isinstance(x, (list, tuple)):
        return type(x)(_computed(item) for item in x)
    if isinstance(x, dict):
        return {key: _computed(item) for key, item in x.items()}
    return x


def tiled_head(model: PreTrainedModel) -> nn.Linear | None:
    """The output layer, if its logits are made in tiles; `None`: all of them are made.

    A head that PEFT trains whole (`modules_to_save`) is the copy that it trains.
    """
    head: Any = model.get_output_embeddings()
    copies, active = getattr(head, "modules_to_save", {}), getattr(head, "active_adapters", [])
    if len(active) == 1 and active[0] in copies:
        head = copies[active[0]]
    # not `type(head)`: FSDP2 gives a module another class
    is_linear = (
        isinstance(head, nn.Linear)
        and type(head).forward is nn.Linear.forward
        and "forward" not in head.__dict__
    )
    return head if is_linear and model.loss_function is ForCausalLMLoss else None


@contextmanager
def lazy_logits(model: PreTrainedModel) -> Iterator[None]:
    """Inside, `model`'s head returns `LazyLogits` and its loss function takes them tile by tile.

    A head that is no plain linear map, or a loss of the model's own, stays as it is, with all its logits.
    """
    head = tiled_head(model)
    if head is None:
        yield
        return

    def call(hidden: Tensor) -> Tensor:
        device_type = hidden.device.type
        autocast = torch.is_autocast_enabled(device_type)
        return LazyLogits(
            hidden, head, (), torch.get_autocast_dtype(device_type) if autocast else hidden.dtype
        )

    # The one attribute of a module that comes before its hooks (torch.nn.Module._wrapped_call_impl, 2.13).
    attribute = "_compiled_call_impl"
    before = [
        (head, attribute, head.__dict__.get(attribute)),
        (model, "_loss_function", model.__dict__.get("_loss_function")),
    ]
    try:
        head._compiled_call_impl = call
        model._loss_function = tiled_causal_lm_loss
        yield
    finally:
        for owner, name, value in before:
            if value is None:
                owner.__dict__.pop(name, None)
            else:
                owner.__dict__[name] = value


def tiled_causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """transformers' `ForCausalLMLoss`, for `LazyLogits` without ever making them.

    Args:
        logits: (B, T, V).
        labels: (B, T), shifted here; `shift_labels`: (B, T), shifted already.
        num_items_in_batch: The loss is the sum over tokens divided by this; else the mean, 0 if all are
            ignored.
    """
    if not isinstance(logits, LazyLogits) or logits.detached or logits.shape[-1] != vocab_size:
        num_items: Any = num_items_in_batch
        return ForCausalLMLoss(
            _computed(logits), labels, vocab_size, num_items, ignore_index, shift_labels, **kwargs
        )
    if shift_labels is None:
        assert labels is not None
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]

    def loss_of(hidden: Tensor) -> Tensor:
        weight, bias = logits.head.weight, logits.head.bias
        compute = partial(
            linear_cross_entropy,
            hidden,
            weight,
            bias,
            shift_labels.to(hidden.device),
            operations=logits.operations,
            num_items=num_items_in_batch,
            ignore_index=ignore_index,
        )
        return attempt(compute, lambda: no_loss(hidden, weight, bias))

    return logits.call_head(loss_of)
