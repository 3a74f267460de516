"""What engines that share weights among ranks have gathered, and the buffers of their collectives, by moment.

Sources, read in their code and compared with counted bytes (docs/memory.md): torch 2.13
(distributed/fsdp/_fully_shard: `_fsdp_param_group.py` for what is prefetched and how long a buffer lives),
cut as Accelerate does; DeepSpeed 0.19 (runtime/zero/partitioned_param_coordinator.py).
"""

from __future__ import annotations

from collections.abc import Callable

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
    reduction sends lives until the next one.

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
        return _parts(gathered, self._units[group[-1]] + max(0, before - above_bytes))

    def loss(self, tile_bytes: int) -> Parts:
        last = self._units[-1]
        if self._tied:
            return _parts(self._tied, last)
        return _parts(self._head, self._head + max(0, last - tile_bytes))

    def loss_backward(self) -> Parts:
        return _parts(self._tied or self._head, self._units[-1])

    def norm(self) -> Parts:
        return _parts(self._tied, self._units[-1] + self._head_sent + self._waits)

    def backward(self, group: range) -> Parts:
        num_layers = len(self._units)
        ahead = 0
        if len(group) == 1:
            ahead = self._units[group.start - 1] if group.start else self._embedding - self._tied
        sent = self._head_sent if group.stop == num_layers else self._sent[group.stop]
        return _parts(self._tied + sum(self._units[i] for i in group), ahead + sent + self._waits)

    def embedding(self) -> Parts:
        return _parts(self._embedding, self._sent[0])


class Zero3Gathered(Gathered):
    """ZeRO-3 keeps up to `max_live_numbers` gathered, and at least what runs."""

    def __init__(self, sizes: ModelSizes, max_live_numbers: int, element_bytes: int) -> None:
        self._sizes, self._max_live, self._element = sizes, max_live_numbers, element_bytes

    def forward(self, group: range, above_bytes: int) -> Parts:
        return self._live(*(self._sizes.layers[i] for i in group))

    def loss(self, tile_bytes: int) -> Parts:
        return self._live(self._sizes.head)

    def loss_backward(self) -> Parts:
        return self._live(self._sizes.head)

    def norm(self) -> Parts:
        return self._live()

    def backward(self, group: range) -> Parts:
        return self._live(*(self._sizes.layers[i] for i in group))

    def embedding(self) -> Parts:
        return self._live(self._sizes.embedding)

    def _live(self, *running: Weights) -> Parts:
        numbers = max(self._max_live, sum(weights.num_numbers for weights in running))
        # Its buckets are there all the time: `Engine.between_steps`.
        return {"gathered weights": min(numbers, self._sizes.all_weights.num_numbers) * self._element}


def _parts(gathered: int, collectives: int) -> Parts:
    return {"gathered weights": gathered, "collectives": collectives}
