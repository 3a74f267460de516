"""What engines that share weights among ranks have gathered, and the buffers of their collectives, by moment.

Sources, read in their code and compared with counted bytes (docs/memory.md): torch 2.13
(distributed/fsdp/_fully_shard: `_fsdp_param_group.py` for what is prefetched and how long a buffer lives),
cut as Accelerate does; DeepSpeed 0.19 (runtime/zero/partitioned_param_coordinator.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from chunkdist.memory.model_sizes import ModelSizes, Weights

Parts = dict[str, int]
"""Bytes by name."""


class Gathered:
    """Nothing is: every rank has all weights."""

    def forward(self, group: range, above_bytes: int) -> Parts:
        """While a group runs forward.

        Args:
            group: Its layers.
            above_bytes: What the group takes in its run beside; the gather before has it to spare.
        """
        return {}

    def loss(self, tile_bytes: int) -> Parts:
        """While the loss runs, of which tiles take so much."""
        return {}

    def loss_backward(self) -> Parts:
        return {}

    def norm(self) -> Parts:
        """Between the loss's backward and the last group's."""
        return {}

    def backward(self, group: range) -> Parts:
        """While a group runs backward."""
        return {}

    def embedding(self) -> Parts:
        """While the embedding's gradient is made, at the end."""
        return {}


class Fsdp2Gathered(Gathered):
    """Units are the layers, the embedding, and the head; one for both where they are tied, with the norm.

    A gather has a buffer as large as the unit until it is copied out; in the forward it lives until the next
    unit's is. In the backward the unit below is gathered ahead, unless that is one of the same group. What a
    reduction sends lives until the next one. Accelerate puts the final norm and the head into one unit, which
    stays whole from the norm's call until the loss's backward has reached it.

    One rank gathers from nobody: it copies a unit when it runs, ahead of nothing, and needs no buffer.

    Args:
        whole: Bytes of some weights, gathered.
        reduced: Bytes of the gradients that are sent for them.
    """

    def __init__(
        self,
        sizes: ModelSizes,
        num_ranks: int,
        whole: Callable[[Weights], int],
        reduced: Callable[[Weights], int],
    ) -> None:
        self._is_alone = num_ranks == 1
        self._units = [whole(layer) for layer in sizes.layers]
        self._sent = [reduced(layer) for layer in sizes.layers]
        self._embedding, self._head = whole(sizes.embedding), whole(sizes.head)
        self._head_sent = reduced(sizes.head)
        self._tied = self._embedding if sizes.is_tied else 0
        # A tied weight's gradient is reduced at the end, when it is whole; its shard is counted elsewhere.
        self._waits = reduced(sizes.embedding) * (num_ranks - 1) // num_ranks if sizes.is_tied else 0

    def forward(self, group: range, above_bytes: int) -> Parts:
        before = self._units[group.start - 1] if group.start else self._embedding - self._tied
        gathered = self._tied + sum(self._units[i] for i in group)
        return self._parts(gathered, self._units[group[-1]] + max(0, before - above_bytes))

    def loss(self, tile_bytes: int) -> Parts:
        last = self._units[-1]
        if self._tied:
            return self._parts(self._tied, last)
        return self._parts(self._head, self._head + max(0, last - tile_bytes))

    def loss_backward(self) -> Parts:
        return self._parts(self._tied or self._head, self._units[-1])

    def norm(self) -> Parts:
        return self._parts(self._tied or self._head, self._units[-1], self._head_sent + self._waits)

    def backward(self, group: range) -> Parts:
        num_layers = len(self._units)
        ahead = 0
        if len(group) == 1:
            ahead = self._units[group.start - 1] if group.start else self._embedding - self._tied
        sent = self._head_sent if group.stop == num_layers else self._sent[group.stop]
        return self._parts(self._tied + sum(self._units[i] for i in group), ahead, sent + self._waits)

    def embedding(self) -> Parts:
        return self._parts(self._embedding, 0, self._sent[0])

    def _parts(self, gathered: int, buffers: int, sent: int = 0) -> Parts:
        """`buffers` are those of gathers, and what is gathered ahead; `sent` is what a reduction sends."""
        return {"gathered weights": gathered, "collectives": sent + (0 if self._is_alone else buffers)}


class Zero3Gathered(Gathered):
    """ZeRO-3 keeps up to `max_live_numbers` gathered, and at least what runs. While it has fewer, it
    gathers the next module's weights ahead, all of them."""

    def __init__(self, sizes: ModelSizes, max_live_numbers: int, element_bytes: int) -> None:
        self._sizes, self._max_live, self._element = sizes, max_live_numbers, element_bytes

    def forward(self, group: range, above_bytes: int) -> Parts:
        layers = self._sizes.layers
        ahead = layers[group.stop] if group.stop < len(layers) else self._sizes.head
        return self._live([layers[i] for i in group], ahead)

    def loss(self, tile_bytes: int) -> Parts:
        return self._live([self._sizes.head])

    def loss_backward(self) -> Parts:
        return self._live([self._sizes.head])

    def norm(self) -> Parts:
        return self._live([], self._sizes.layers[-1])

    def backward(self, group: range) -> Parts:
        layers = self._sizes.layers
        ahead = layers[group.start - 1] if group.start else self._sizes.embedding
        return self._live([layers[i] for i in group], ahead)

    def embedding(self) -> Parts:
        return self._live([self._sizes.embedding])

    def _live(self, running: Sequence[Weights], ahead: Weights | None = None) -> Parts:
        numbers = sum(weights.num_numbers for weights in running)
        if ahead is not None and numbers < self._max_live:
            numbers += ahead.num_numbers
        numbers = max(self._max_live, numbers)
        # Its buckets are there all the time: `Engine.between_steps`.
        return {"gathered weights": min(numbers, self._sizes.all_weights.num_numbers) * self._element}
