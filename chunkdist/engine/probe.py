"""Asks a layer whose class is not known to be exact: a few tokens in chunks against the same tokens at once.

Made where a layer is first called, with what it is called with there: its weights (gathered, if an engine
shards them), its arguments, its device and the kernels that run on it. Gradients are compared too: a layer
that ignores the state it is given can have a loss that is right to six digits, and gradients that are off by
a third.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from typing import Any
from weakref import WeakSet

import torch
import transformers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from chunkdist.attention import AttentionChoice
from chunkdist.attention.cell import Cell
from chunkdist.engine.cell import CellOutput, rerun
from chunkdist.engine.layer import GroupLayer
from chunkdist.engine.parameters import GroupParameters
from chunkdist.errors import UnsupportedModelError
from chunkdist.models.arguments import SEGMENT_ARGUMENTS, slice_tokens
from chunkdist.models.exact_classes import CLASSES, IMAGE_CLASSES, TRANSFORMERS_VERSION
from chunkdist.replay import undisturbed_rng
from chunkdist.stores.kv_store import KVStore
from chunkdist.stores.state_relay import StateStore
from chunkdist.stream.stream import Chunk, Stream

NUM_TOKENS = 150
SMALL_CHUNK, LARGE_CHUNK = 5, 70
"""More than one convolution's reach, so that some tokens see the state of a chunk before and some do not; and
more than the 64 tokens in which kernels of linear attention and state spaces go through a chunk."""
TOLERANCE = 1e-2
"""Bound, relative to the norm: rounding in fp32 is a thousandth of it, that of kernels in TF32 a tenth; a
state that is
ignored, ten times it."""
_MOVE = 0.03
KERNELS = ("fla", "causal_conv1d", "mamba_ssm")
"""Packages whose kernels transformers' layers with state take in place of their torch code."""


def is_known(model_class: type) -> bool:
    """Whether the sweep over transformers' classes has found the class to be exact, in this version."""
    own = model_class.__module__.startswith("transformers.")
    is_exact = model_class.__name__ in CLASSES or model_class.__name__ in IMAGE_CLASSES
    return own and transformers.__version__ == TRANSFORMERS_VERSION and is_exact


def needs_probe(model: nn.Module, *, has_state: bool) -> bool:
    """Whether a model's layers are to be asked: the sweep has not seen its class, or not with the kernels of
    its layers with state."""
    other_kernels = any(find_spec(name) for name in KERNELS) or getattr(model, "use_kernels", False)
    return not is_known(type(model)) or (has_state and other_kernels)


class LayerProbe:
    """Probes each layer once: layers of one class may differ in what is set on them.

    Args:
        tolerance: Bound, relative to the norm.
        moves_weights: Whether trainable weights are moved for the probe: behind a matrix of zeros, as
            adapters begin with, a fault does not show.
        widens: Whether what is narrower than fp32 is in fp32 for the probe.
    """

    def __init__(
        self, *, tolerance: float = TOLERANCE, moves_weights: bool = False, widens: bool = True
    ) -> None:
        self._tolerance = tolerance
        self._moves_weights = moves_weights
        self._in_fp32 = _in_fp32 if widens else _copy
        self._widens = widens
        self.passed: WeakSet[nn.Module] = WeakSet()

    def check(self, layer: GroupLayer, hidden: Tensor, arguments: dict[str, Any], stream: Stream) -> None:
        """Raises `UnsupportedModelError` if the layer is not exact in chunks.

        Tensors without storage and streams of fewer than 2 tokens (4, with state) show nothing, and are let
        through.
        """
        tokens = Chunk(0, min(NUM_TOKENS, stream.num_tokens))
        few = 4 if layer.cache_argument is not None else 2
        shows_nothing = tokens.num_tokens < few or hidden.is_meta or isinstance(hidden, FakeTensor)
        if layer.layer in self.passed or shows_nothing:
            return
        arguments = {key: x for key, x in arguments.items() if key not in SEGMENT_ARGUMENTS}
        arguments = _map_tensors(slice_tokens(arguments, tokens, stream.num_tokens), self._in_fp32)
        with (
            undisturbed_rng(hidden),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(hidden.device.type, enabled=False),
            without_dropout(layer.layer),
            other_weights(layer.layer, widened=self._widens, moved=self._moves_weights),
        ):
            x_BTH = self._in_fp32(hidden[:, : tokens.num_tokens]).requires_grad_()
            parameters = GroupParameters([layer.layer])
            names = {id(p): name for name, p in layer.layer.named_parameters()}
            labels = ["output", "its input", *(names[id(p)] for p in parameters.trainable)]
            whole = _whole(layer, x_BTH, arguments, parameters)
            chunked = _chunked(layer, x_BTH.detach(), arguments, parameters)
        error, label = _largest_difference(whole, chunked, labels)
        if not error <= self._tolerance:
            what = "output" if label == "output" else f"gradient of {label}"
            raise UnsupportedModelError(
                f"{type(layer.layer).__name__} is not exact in chunks: with {tokens.num_tokens} tokens in "
                f"{len(_chunks(tokens.num_tokens))} chunks, the {what} is off by {error:.1e}"
            )
        self.passed.add(layer.layer)


def _chunks(num_tokens: int) -> tuple[Chunk, ...]:
    """Two small ones, then large ones; none is a single token (see `cut_segments`)."""
    small = min(SMALL_CHUNK, num_tokens // 2)
    bounds = [0, small, *range(2 * small, num_tokens - 1, LARGE_CHUNK), num_tokens]
    return tuple(Chunk(start, end) for start, end in pairwise(bounds))


def _grad(x_BTH: Tensor) -> Tensor:
    """A gradient of the output, other for each number in it."""
    numbers = torch.arange(x_BTH.numel(), device=x_BTH.device, dtype=torch.float64)
    return torch.sin(numbers + 1).to(x_BTH.dtype).view(x_BTH.shape)


def _whole(
    layer: GroupLayer, x_BTH: Tensor, arguments: dict[str, Any], parameters: GroupParameters
) -> list[Tensor | None]:
    """Output, gradient of the input, gradients of the parameters: as without chunks, and without a cache."""
    tokens = Chunk(0, x_BTH.shape[1])
    stream = _stream(x_BTH, (tokens,))
    assert layer.state is not None
    layer.state.cell = Cell(tokens, stream, KVStore(tokens, None), AttentionChoice("math"))  # and no cache
    try:
        output = layer.original_forward(x_BTH, **arguments)
    finally:
        layer.state.cell = None
    output = output[0] if isinstance(output, tuple) else output
    inputs = [x_BTH, *parameters.trainable]
    return [output.detach(), *torch.autograd.grad(output, inputs, _grad(output), allow_unused=True)]


def _chunked(
    layer: GroupLayer, x_BTH: Tensor, arguments: dict[str, Any], parameters: GroupParameters
) -> list[Tensor | None]:
    """Output and gradients of the same tokens as a layer group computes them."""
    num_tokens = x_BTH.shape[1]
    stream = _stream(x_BTH, _chunks(num_tokens))
    store, states, choice = KVStore(Chunk(0, num_tokens), None), StateStore(), AttentionChoice("math")

    def run(chunk: Chunk, x: Tensor) -> CellOutput:
        cell = layer.cell(chunk, stream, store, states, attention=choice)
        assert cell is not None
        output = layer.run(cell, x, slice_tokens(arguments, chunk, num_tokens))
        return CellOutput(output, [] if cell.relay is None else [cell.relay])

    outputs = []
    with torch.no_grad():
        for chunk in stream.chunks:
            output, relays, _ = run(chunk, x_BTH[:, chunk.start : chunk.end].contiguous())
            for relay in relays:
                relay.hand_on(stream.behind(chunk))
            outputs.append(output)
    output = torch.cat(outputs, dim=1)
    grad_output, grad_x = _grad(output), torch.zeros_like(x_BTH)
    for chunk in reversed(stream.chunks):
        tokens = slice(chunk.start, chunk.end)
        leaf = x_BTH[:, tokens].contiguous().requires_grad_()
        graph = rerun(leaf, partial(run, chunk, leaf), parameters)
        found = graph.backward(grad_output[:, tokens])
        if found is not None:
            grad_x[:, tokens] = found
    return [output, grad_x, *parameters.take_grads()]


def _stream(x_BTH: Tensor, chunks: tuple[Chunk, ...]) -> Stream:
    num_rows, num_tokens = x_BTH.shape[:2]
    return Stream(num_tokens=num_tokens, chunks=chunks, segment_starts=((0,),) * num_rows)


def _largest_difference(
    expected: list[Tensor | None], found: list[Tensor | None], labels: list[str]
) -> tuple[float, str]:
    """Relative to the norm; gradients that are zero but for rounding, to the largest gradient's."""
    grads = [x for x in expected[1:] if x is not None]
    floor = 1e-3 * max((float(x.norm()) for x in grads), default=0.0)
    worst = (0.0, "output")
    for index, (a, b, label) in enumerate(zip(expected, found, labels, strict=True)):
        if a is None and b is None:
            continue
        a, b = (
            torch.zeros_like(other) if x is None else x for x, other in ((a, b), (b, a)) if other is not None
        )
        error = float((a - b).norm() / (a.norm() + (floor if index else 0.0)))
        worst = max(worst, (error if error == error else float("inf"), label))
    return worst


@contextmanager
def without_dropout(layer: nn.Module) -> Iterator[None]:
    dropouts = [m for m in layer.modules() if isinstance(m, nn.modules.dropout._DropoutNd) and m.training]
    try:
        for module in dropouts:
            module.training = False
        yield
    finally:
        for module in dropouts:
            module.training = True


@contextmanager
def other_weights(layer: nn.Module, *, widened: bool, moved: bool) -> Iterator[None]:
    """Packed weights of quantised layers stay as they are.

    Args:
        widened: In fp32: rounding of bf16 would hide small faults.
        moved: Trainable weights are other ones inside, near to their own.
    """
    draws = torch.Generator().manual_seed(0)
    before: list[tuple[Any, str, Tensor]] = []
    copies: dict[int, Tensor] = {}
    try:
        for module in layer.modules():
            for slots in (module._parameters, module._buffers):
                for name, x in slots.items():
                    if x is None or not x.is_floating_point():
                        continue
                    is_narrow = widened and x.dtype in (torch.bfloat16, torch.float16)
                    is_moved = moved and x.requires_grad
                    if not is_narrow and not is_moved:
                        continue
                    if id(x) not in copies:
                        wide = x.detach().float() if is_narrow else x.detach()
                        if is_moved:
                            wide = wide + _MOVE * torch.randn(x.shape, generator=draws).to(wide)
                        copies[id(x)] = (
                            nn.Parameter(wide, x.requires_grad) if slots is module._parameters else wide
                        )
                    before.append((slots, name, x))
        for slots, name, x in before:
            slots[name] = copies[id(x)]
        yield
    finally:
        for slots, name, x in before:
            slots[name] = x


def _in_fp32(x: Tensor) -> Tensor:
    """A copy, in at least fp32."""
    wide = torch.promote_types(x.dtype, torch.float32) if x.is_floating_point() else x.dtype
    return x.detach().to(wide, copy=True)


def _copy(x: Tensor) -> Tensor:
    return x.detach().clone()


def _map_tensors(arguments: Any, function: Any) -> Any:
    if isinstance(arguments, Tensor):
        return function(arguments)
    if isinstance(arguments, Mapping):
        return {key: _map_tensors(x, function) for key, x in arguments.items()}
    if isinstance(arguments, (tuple, list)):
        return type(arguments)(_map_tensors(x, function) for x in arguments)
    return arguments
