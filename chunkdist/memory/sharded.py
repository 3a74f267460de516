"""What sharding engines make of weights, gradients and optimizer states, and what they gather in a step.

Sources: docs/sharding.md, and, read in their code, torch 2.13 (distributed/fsdp/_fully_shard: units, one
prefetched, buffers of gathers and reductions), DeepSpeed 0.19 (runtime/zero/stage3.py, stage_1_and_2.py: fp32
masters, gradient partitions, buckets), torch's DDP (gradients and buckets of the same size).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from chunkdist.memory.allgather_bytes import Fsdp2Gathered, Gathered, Zero3Gathered
from chunkdist.memory.model_sizes import ModelSizes, Weights
from chunkdist.memory.optimizers import OptimizerMemory

EngineName = Literal["single", "ddp", "fsdp2", "zero1", "zero2", "zero3"]
ENGINE_NAMES: tuple[EngineName, ...] = ("single", "ddp", "fsdp2", "zero1", "zero2", "zero3")
_ZERO = ("zero1", "zero2", "zero3")


@dataclass(frozen=True, kw_only=True)
class Engine:
    """How a job is spread over ranks.

    Args:
        gathered_element_bytes: Bytes of an element in gathered weights and reduced gradients; `None`: as
            stored (mixed precision keeps fp32 and gathers 2 bytes).
        offloads_weights, offloads_optimizer: Whether they lie on the host between uses.
        max_live_numbers: Elements of gathered weights that ZeRO-3 keeps at a time
            (`stage3_max_live_parameters`).
        bucket_numbers: Elements of gradients that ZeRO reduces at a time; `None`: the square of the hidden
            size, what transformers puts for `"auto"`.
    """

    name: EngineName = "single"
    num_ranks: int = 1
    gathered_element_bytes: int | None = None
    offloads_weights: bool = False
    offloads_optimizer: bool = False
    max_live_numbers: int = 10**9
    bucket_numbers: int | None = None

    @property
    def weights_dtype(self) -> torch.dtype | None:
        """In which weights are while they are used, where that is not how they are kept."""
        mixes = self.name in ("fsdp2", *_ZERO) and self.gathered_element_bytes == 2
        return torch.bfloat16 if mixes else None

    @property
    def shards_weights(self) -> bool:
        return self.name in ("fsdp2", "zero3")

    def between_steps(
        self, sizes: ModelSizes, states: OptimizerMemory | None
    ) -> tuple[dict[str, int], dict[str, int]]:
        """What is there all the time, on the device and on the host."""
        every = sizes.all_weights
        weights = self._weights(every)
        optimizer = self._optimizer_bytes(sizes, states)
        collectives = 0
        if self.name == "ddp":
            collectives = every.whole_trainable_bytes
        elif self.name in _ZERO:
            collectives = 2 * self._bucket_numbers(sizes) * self._element(every)  # two, for overlap_comm
        device = {"weights": weights, "optimizer": optimizer, "collectives": collectives}
        host: dict[str, int] = {}
        if self.offloads_weights:
            device["weights"], host["weights on the host"] = 0, weights
        if self.offloads_optimizer:
            device["optimizer"], host["optimizer on the host"] = 0, optimizer
        if states is not None and states.is_paged:
            device["optimizer"], host["optimizer, paged"] = 0, optimizer
        return device, host

    def gradients(self, sizes: ModelSizes, parts: Sequence[Weights], *, are_summed: bool = False) -> int:
        """Bytes of the gradients of these weights, once they are reduced.

        Args:
            are_summed: Over micro-batches, of which only the last is reduced, under FSDP2.
        """
        if self.name == "zero3":  # one buffer for all, from the beginning
            return self._share(sizes.all_weights.num_trainable * self._element(sizes.all_weights))
        if self.name == "fsdp2" and are_summed:
            return sum(w.num_trainable * self._element(w) for w in parts)
        trained = sum(w.whole_trainable_bytes for w in parts)
        return self._share(trained) if self.name in ("fsdp2", "zero2") else trained

    def gathered(self, sizes: ModelSizes) -> Gathered:
        """What is gathered through a step."""
        if self.name == "fsdp2":
            return Fsdp2Gathered(
                sizes, self.num_ranks, self._whole, lambda w: w.num_trainable * self._element(w)
            )
        if self.name == "zero3":
            return Zero3Gathered(sizes, self.max_live_numbers, self._element(sizes.all_weights))
        return Gathered()

    def update(self, sizes: ModelSizes, states: OptimizerMemory | None) -> dict[str, int]:
        """While the optimizer runs."""
        trained = sizes.all_weights.whole_trainable_bytes
        share = self.num_ranks if self.name not in ("single", "ddp") else 1
        temporary = 0 if states is None or self.offloads_optimizer else states.update * trained // share
        return {"gradients": self.gradients(sizes, [sizes.all_weights]), "one cell": temporary}

    def _optimizer_bytes(self, sizes: ModelSizes, states: OptimizerMemory | None) -> int:
        if states is None:
            return 0
        every = sizes.all_weights
        numbers, size = every.num_trainable, every.whole_trainable_bytes
        if self.name in ("single", "ddp"):
            return states.state_bytes(numbers, size, every.factored_numbers)
        if self.name in _ZERO:  # fp32 masters, and states of them
            return self._share(4 * numbers + states.state_bytes(numbers, 4 * numbers, every.factored_numbers))
        return self._share(states.state_bytes(numbers, size, every.factored_numbers))

    def _weights(self, every: Weights) -> int:
        """They may have been sharded already, or not yet; DeepSpeed keeps them as they are used."""
        if self.shards_weights and every.local_bytes < every.whole_bytes:
            return every.local_bytes
        whole = self._whole(every) if self.name in _ZERO else every.local_bytes
        return self._share(whole) if self.shards_weights else whole

    def _share(self, num_bytes: int) -> int:
        return -(-num_bytes // self.num_ranks)

    def _whole(self, weights: Weights) -> int:
        if self.gathered_element_bytes is None:
            return weights.whole_bytes
        return weights.num_numbers * self.gathered_element_bytes

    def _element(self, weights: Weights) -> int:
        return self.gathered_element_bytes or weights.whole_bytes // max(1, weights.num_numbers)

    def _bucket_numbers(self, sizes: ModelSizes) -> int:
        if self.bucket_numbers is not None:
            return self.bucket_numbers
        return (sizes.stream.hidden_bytes // sizes.element_bytes) ** 2


SINGLE = Engine()
