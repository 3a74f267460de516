"""What one cell needs, counted: a twin of the model without storage runs one step in two chunks.

What autograd saves depends on adapters, dtypes and what is trained; it is linear in the tokens of the chunk.
So it is not written down as a formula per model, but counted for two chunk sizes, and the line through them
is taken. What attention's backward takes beside, for the chunk and for the prefix, is counted with it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from chunkdist.attention import AttentionChoice
from chunkdist.attention.base import AttentionRow, AttentionVariant, Backend, RowGradient
from chunkdist.attention.efficient import EfficientBackend
from chunkdist.attention.varlen import SCRATCH_BYTES, VarlenBackend, why_no_kernel
from chunkdist.config import AttentionName, ChunkConfig
from chunkdist.engine.chunked_model import ChunkedModel
from chunkdist.memory.fake_model import layer_kinds, loss_of, twin_of, without_triton_kernels
from chunkdist.memory.live_bytes import LiveBytes
from chunkdist.models.layers import causal_lm_of, find_layers, mixer_of
from chunkdist.replay import undisturbed_rng

_CHUNKS = (1024, 4096)
"""Tokens of the two chunk sizes, around those in use: a longer one takes no longer."""


def _chunks_of(base: Any) -> tuple[int, int]:
    """The two sizes for one model. Torch code of layers with state loops over blocks of 64 tokens or over
    tokens, so few are taken; state-space layers fill up to blocks of a size in the config."""
    if all(mixer_of(layer) is None for layer in find_layers(base)[2]):
        return _CHUNKS
    text = base.config.get_text_config(decoder=True)
    block = max(64, *(getattr(text, name, None) or 0 for name in ("mamba_chunk_size", "chunk_size")))
    return block, 4 * block


@dataclass(frozen=True, kw_only=True)
class Line:
    """Bytes: a constant, and per token of a chunk."""

    constant: float = 0.0
    per_token: float = 0.0

    def at(self, num_tokens: int) -> int:
        return round(self.constant + self.per_token * num_tokens)

    @classmethod
    def through(cls, values: dict[int, float]) -> Line:
        (first, low), (second, high) = sorted(values.items())
        slope = (high - low) / (second - first)
        return cls(constant=low - slope * first, per_token=slope)


@dataclass(frozen=True, kw_only=True)
class CellSizes:
    """Sizes of one layer's cell, for one row; bytes over what was alive when the cell began.

    Args:
        forward: The peak of a run without a graph.
        saved: What its graph holds, the output included.
        attention: Alive when the backward of its attention begins; 0 without attention.
        elsewhere: The peak of its backward outside of attention.
        workspace: What attention's backward takes beside, by token of the chunk.
        workspace_per_key: The same by token of what it attends to.
        workspace_per_pair: The same by both; 0 for flash kernels.
        kv_bytes: K and V of a token; 0 without attention.
        kv_numbers: How many numbers these are.
        kv_heads: Heads of K, and of V.
        attention_bytes: What attention returns of a token, output and log-sum-exp; 0 without attention.
        window: Its sliding window, in tokens.
        state_bytes: State at a chunk's start.
    """

    forward: Line
    saved: Line
    attention: Line
    elsewhere: Line
    workspace: Line
    workspace_per_key: float
    workspace_per_pair: float
    kv_bytes: int
    kv_numbers: int
    kv_heads: int
    attention_bytes: int
    window: int | None
    state_bytes: int

    def kept_bytes(self, config: ChunkConfig, num_tokens: int) -> int:
        """What of attention's outputs is kept, of one token of a row of `num_tokens`."""
        return self.attention_bytes if config.keeps_attention_of(self.window, num_tokens) else 0

    def keys_workspace(self, num_keys: int, num_tokens: int) -> int:
        """Bytes that attention's backward takes for so many keys, of a chunk of so many tokens.

        Flash kernels make gradients of K and V per query head; their backends have them do so for some of the
        kv heads at a time, past `SCRATCH_BYTES` (`chunkdist.attention.varlen`).
        """
        per_query_head = (self.workspace_per_key - self.kv_bytes) * num_keys
        taken = self.workspace_per_key * num_keys
        if not self.workspace_per_pair and per_query_head > SCRATCH_BYTES:
            heads = max(1, int(SCRATCH_BYTES // (per_query_head / self.kv_heads)))
            taken *= heads / self.kv_heads
        return round(taken + self.workspace_per_pair * num_keys * num_tokens)


@dataclass(frozen=True, kw_only=True)
class StreamSizes:
    """Beside the cells, by token: a row's hidden states, and what the decoder hands to all layers (rotary
    embeddings, positions)."""

    hidden_bytes: int
    arguments_bytes: int


@dataclass
class _Seen:
    """Bytes seen in one cell's run with a graph."""

    base: int = 0
    forward: int = 0
    saved: int = 0
    attention: int = 0
    elsewhere: int = 0
    workspace: int = 0


class GpuAttention(AttentionChoice):
    """What a GPU would run, whatever this machine has: flash attention wherever its kernels fit."""

    def backend_for(self, q: Tensor, variant: AttentionVariant) -> Backend:
        if why_no_kernel(q) is None:
            return VarlenBackend()  # soft-caps need flash-attn, whose kernel takes the same memory
        efficient = EfficientBackend()
        if efficient.why_not(q, variant) is None:
            return efficient
        return super().backend_for(q, variant)


@dataclass
class _Watch:
    """Notes what is alive while a twin runs."""

    live: LiveBytes
    choice: AttentionChoice
    seen: dict[tuple[int, int], _Seen] = field(default_factory=dict)
    """By layer and index of the chunk."""
    kv: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    attention_bytes: dict[int, int] = field(default_factory=dict)
    windows: dict[int, int | None] = field(default_factory=dict)
    running: list[tuple[int, int]] = field(default_factory=list)
    arguments_bytes: int | None = None
    hidden_bytes: int = 0
    state_bytes: list[int] = field(default_factory=list)

    def around(self, number: int, forward: Callable[..., Any], chunk_tokens: int) -> Callable[..., Any]:
        def run(hidden: Tensor, **arguments: Any) -> Any:
            token_bytes = hidden.shape[-1] * hidden.element_size()
            chunk = hidden.storage_offset() // (hidden.shape[-1] * chunk_tokens)
            seen = self.seen.setdefault((number, chunk), _Seen())
            if self.arguments_bytes is None:
                whole = hidden.untyped_storage().nbytes()
                self.arguments_bytes, self.hidden_bytes = self.live.current_bytes - whole, token_bytes
            base = self.live.current_bytes
            self.live.reset_peak()
            output = forward(hidden, **arguments)
            if not torch.is_grad_enabled():
                seen.forward = self.live.peak_bytes - base
                return output
            self.running.append((number, chunk))
            seen.base, seen.saved = base, self.live.current_bytes - base
            seen.elsewhere = self.live.peak_bytes - base
            self.live.reset_peak()
            hidden.register_hook(lambda grad: self.note_peak())
            return output

        return run

    def note_peak(self) -> None:
        seen = self.seen[self.running[-1]]
        seen.elsewhere = max(seen.elsewhere, self.live.peak_bytes - seen.base)

    def backend_for(self, q: Tensor, variant: AttentionVariant) -> Backend:
        return _Counted(self.choice.backend_for(q, variant), self)

    @property
    def reasons(self) -> dict[str, str]:
        return self.choice.reasons


class _Counted:
    """An attention backend that tells what it takes."""

    def __init__(self, inner: Backend, watch: _Watch) -> None:
        self._inner, self._watch = inner, watch
        self.name, self.equal_head_dims = inner.name, inner.equal_head_dims

    def why_not(self, q: Tensor, variant: AttentionVariant) -> str | None:
        return self._inner.why_not(q, variant)

    def forward(self, row: AttentionRow) -> tuple[Tensor, Tensor]:
        return self._inner.forward(row)

    def backward(self, row: AttentionRow, given: RowGradient) -> Tensor:
        watch = self._watch
        number, chunk = watch.running[-1]
        watch.note_peak()
        seen, before = watch.seen[number, chunk], watch.live.current_bytes
        seen.attention = before - seen.base
        numbers = (row.k_SKD.numel() + row.v_SKD.numel()) // row.k_SKD.shape[0]
        watch.kv[number] = numbers * row.k_SKD.element_size(), numbers, row.k_SKD.shape[1]
        watch.windows[number] = row.variant.window
        outputs = (given.out_TND, given.lse_NT)
        watch.attention_bytes[number] = sum(x.nbytes for x in outputs) // row.q_TND.shape[0]
        watch.live.reset_peak()
        result = self._inner.backward(row, given)
        seen.workspace = watch.live.peak_bytes - before
        watch.live.reset_peak()
        return result


def measure_cells(
    model: nn.Module,
    *,
    kv_grad_dtype: torch.dtype | None,
    attention: AttentionName = "auto",
    device_type: str = "cpu",
    autocast: torch.dtype | None = None,
    weights_dtype: torch.dtype | None = None,
) -> tuple[list[CellSizes], StreamSizes]:
    """The sizes of each decoder layer's cell, and of what runs between them. Takes about a second.

    Args:
        model: A causal LM, or a PEFT model of one; chunked or not, its weights anywhere, or nowhere.
        device_type: `"cuda"`: with the kernels of GPUs, whatever this machine has.
        autocast: The dtype of the run's autocast, if it has one.
        weights_dtype: Dtype of the weights when an engine has gathered them; `None`: as they are.

    Raises:
        UnsupportedModelError: the model cannot be chunked.
        torch._subclasses.fake_tensor.DataDependentOutputException and its like: what runs follows from values
            (experts).
    """
    base = causal_lm_of(model)
    kinds = layer_kinds(base)
    firsts = {kind: kinds.index(kind) for kind in dict.fromkeys(kinds)}
    chunks = _chunks_of(base)
    config = ChunkConfig(
        chunk_size=1,
        rebuild_kv=False,
        keep_attention=False,
        attention=attention,
        kv_grad_dtype=kv_grad_dtype,
    )
    num_layers = max(firsts.values()) + 1
    runs = {
        size: _run(model, num_layers, size, config, device_type, autocast, weights_dtype) for size in chunks
    }
    sizes = {kind: _cell_sizes(runs, number) for kind, number in firsts.items()}
    first = runs[chunks[0]]
    assert first.arguments_bytes is not None
    stream = StreamSizes(
        hidden_bytes=first.hidden_bytes, arguments_bytes=first.arguments_bytes // (2 * chunks[0])
    )
    return [sizes[kind] for kind in kinds], stream


def _cell_sizes(runs: dict[int, _Watch], number: int) -> CellSizes:
    """Sizes of one layer's cell, from runs by chunk size."""

    def line(name: str) -> Line:
        return Line.through({size: getattr(run.seen[number, 0], name) for size, run in runs.items()})

    # Of a chunk of C tokens that attends to S: a + b C + c S + d C S, with S = C and S = 2 C.
    taken = {size: [run.seen[number, index].workspace for index in (0, 1)] for size, run in runs.items()}
    by_keys = Line.through({size: (second - first) / size for size, (first, second) in taken.items()})
    per_key, per_pair = by_keys.constant, by_keys.per_token
    rest = {size: first - per_key * size - per_pair * size**2 for size, (first, _) in taken.items()}
    run = next(iter(runs.values()))
    kv_bytes, kv_numbers, kv_heads = run.kv.get(number, (0, 0, 0))
    return CellSizes(
        forward=line("forward"),
        saved=line("saved"),
        attention=line("attention"),
        elsewhere=line("elsewhere"),
        workspace=Line.through(rest),
        workspace_per_key=per_key,
        workspace_per_pair=per_pair,
        kv_bytes=kv_bytes,
        kv_numbers=kv_numbers,
        kv_heads=kv_heads,
        attention_bytes=run.attention_bytes.get(number, 0),
        window=runs[max(runs)].windows.get(number),
        state_bytes=run.state_bytes[number],
    )


def _run(
    model: nn.Module,
    num_layers: int,
    chunk_tokens: int,
    config: ChunkConfig,
    device_type: str,
    autocast: torch.dtype | None,
    weights_dtype: torch.dtype | None,
) -> _Watch:
    """One step of a twin over two chunks."""
    with (
        _disable_current_modes(),
        undisturbed_rng(torch.empty(0)),
        FakeTensorMode(),
        without_triton_kernels(),
    ):
        twin: Any = twin_of(model, num_layers, weights_dtype)
        twin.train()
        chunked = ChunkedModel(causal_lm_of(twin), replace(config, chunk_size=chunk_tokens))
        ids = torch.zeros(1, 2 * chunk_tokens, dtype=torch.long)
        live = LiveBytes(exclude=[*twin.parameters(), *twin.buffers(), ids])
        choice = GpuAttention if device_type == "cuda" else AttentionChoice
        watch = _Watch(live, choice(config.attention))
        layers = chunked.layers
        chunked.context.attention = watch  # type: ignore[assignment]
        for number, layer in enumerate(layers):
            layer.original_forward = watch.around(number, layer.original_forward, chunk_tokens)
        twin.get_input_embeddings().register_forward_hook(lambda module, args, out: out.requires_grad_())
        mixed = nullcontext() if autocast is None else torch.autocast("cpu", dtype=autocast)
        with live:
            with mixed:
                loss = loss_of(twin, ids)
            loss.backward()
        watch.state_bytes = [
            sum(shape.numel() * dtype.itemsize for shape, dtype in layer.state_shapes.values())
            for layer in layers
        ]
    return watch
