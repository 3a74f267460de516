"""Keys and values that the backward makes again: a group runs up to the k/v projections of its last layer
that attends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from chunkdist.attention.cell import KeysAndValues
from chunkdist.engine.group_input import Hidden, tokens_of
from chunkdist.engine.layer import GroupLayer
from chunkdist.replay import AutocastState, RngState, without_autocast
from chunkdist.stores.kv_store import KVStore
from chunkdist.stream.stream import Stream

_MAX_TOKENS = 1024
"""The most tokens of several chunks together: small ones keep no processor busy, large ones need no
company."""


def rebuild_parts(
    stream: Stream, run: range, sampled: Sequence[int], rng: Sequence[RngState], *, between_sampled: bool
) -> list[range]:
    """The chunks of a dependent run whose keys and values others of the `sampled` read, by index, in
    consecutive parts.

    Args:
        rng: By chunk, what its forward began with. Where random numbers were drawn, each chunk is a part.
        between_sampled: A sampled chunk always starts a new part, so a part's K/V gradient is complete once
            the next chunk has run backward.
    """
    parts: list[range] = []
    for index in (index for index in run if stream.is_read_later(index, sampled)):
        last = parts[-1] if parts else range(0)
        if (
            index == last.stop
            and last
            and stream.chunks[index].end - stream.chunks[last.start].start <= _MAX_TOKENS
            and not (between_sampled and index in sampled)
            and stream.whole is None  # ranks exchange one chunk at a time
            and rng[index].equals(rng[index - 1])
        ):
            parts[-1] = range(last.start, index + 1)
        else:
            parts.append(range(index, index + 1))
    return parts


class KVRebuild:
    """Makes the keys and values of one group's forward again.

    Args:
        rng, autocast: What the forward of each chunk, and of the group, began with.
        run_layers: Runs the group's layers on consecutive tokens: `run_layers(tokens, hidden,
            stop_at_kv=...)`.
    """

    def __init__(
        self,
        stream: Stream,
        layers: Sequence[GroupLayer],
        rng: Sequence[RngState],
        autocast: AutocastState,
        run_layers: Callable[..., Any],
    ) -> None:
        self._stream, self._layers, self._run_layers = stream, layers, run_layers
        self._rng, self._autocast = rng, autocast

    @property
    def num_layers(self) -> int:
        """How many layers are run, the last one up to its attention; 0: none of them attends."""
        attending = [number for number, layer in enumerate(self._layers, start=1) if layer.calls_attention]
        return max(attending, default=0)

    @torch.no_grad()
    def write(
        self, hidden: Hidden, sampled: Sequence[int], run: range, stores: Sequence[KVStore | None]
    ) -> None:
        """Stores the keys and values that the run's chunks to be rerun read of other chunks; they store their
        own."""
        if not self.num_layers:
            return
        drops = len(sampled) < len(self._stream.chunks)
        if len(self._layers) == 1 and drops:  # else sizes stay those of the forward, and so does each bit
            parts = rebuild_parts(self._stream, run, sampled, self._rng, between_sampled=False)
        else:
            parts = [range(i, i + 1) for i in run if self._stream.is_read_later(i, sampled)]
        with self._autocast.apply():  # once around all parts
            for part in parts:
                store = stores[self.num_layers - 1]
                assert store is not None
                tokens = self._stream.in_whole(self._stream.tokens_of(part))
                store.write(tokens, *self.keys_and_values(part, hidden))
        self._autocast.forget_casts()  # the cells that follow have copies of their own, of the aliases

    def keys_and_values(self, part: range, hidden: Hidden) -> tuple[Tensor, Tensor]:
        """Runs consecutive chunks up to the attention of the group's last layer that attends: its K and V,
        (B, T, K, D) each. Layers below store theirs. The caller has applied autocast."""
        tokens = self._stream.tokens_of(part)
        self._rng[part[0]].restore()
        try:
            self._run_layers(tokens, tokens_of(hidden, tokens).detach(), stop_at_kv=self.num_layers)
        except KeysAndValues as found:
            return found.k_BTKD, found.v_BTKD
        raise AssertionError("the layers ran to their end without attending")

    def add_control_variate(self, part: range, hidden: Hidden, store: KVStore) -> None:
        """Unweighted minus weighted K/V gradient of these chunks reaches the parameters of the norm and the
        k/v projections without a rerun. Its mean over the samples is 0. Parameters are aliased by the
        caller."""
        left_out = store.left_out_of(self._stream.in_whole(self._stream.tokens_of(part)))
        if not left_out:
            return
        with torch.enable_grad(), self._autocast.apply():
            found = self.keys_and_values(part, hidden)
        pairs = [(x, grads.to(x.dtype)) for x, grads in zip(found, left_out, strict=True) if x.requires_grad]
        if pairs:
            with without_autocast(self._autocast.device_type):
                torch.autograd.backward([x for x, _ in pairs], [grads for _, grads in pairs])
