"""What sharding engines make of weights, gradients and optimizer states, and what they gather in a step.

Sources: docs/sharding.md, and, read in their code, torch 2.13 (distributed/fsdp/_fully_shard: units, one
prefetched, buffers of gathers and reductions), DeepSpeed 0.19 (runtime/zero/stage3.py, stage_1_and_2.py: fp32
masters, gradient partitions, buckets), torch's DDP (gradients and buckets of the same size). One rank is a
case of each: nothing is then gathered from others, and what is offloaded is copied in whole.
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
class HostTraffic:
    """Bytes of one rank in a step.

    Args:
        into, out: Over the bus, to the device and from it.
        memory: Through the host's memory, while its processor runs the optimizer.
    """

    into: int = 0
    out: int = 0
    memory: int = 0


@dataclass(frozen=True, kw_only=True)
class Engine:
    """How a job is spread over ranks.

    Args:
        gathered_element_bytes: Bytes of an element in gathered weights and reduced gradients; `None`: as
            stored (mixed precision keeps fp32 and gathers 2 bytes).
        offloads_weights, offloads_optimizer: Whether they lie on the host between uses. FSDP2
            offloads both, and gradients with them.
        max_live_numbers: Elements of gathered weights that ZeRO-3 keeps at a time
            (`stage3_max_live_parameters`).
        bucket_numbers: Elements of gradients that ZeRO reduces at a time; `None`: the square of the hidden
            size, what transformers puts for `"auto"`.
        master_bytes: Bytes of an element of ZeRO's masters, and of the gradients that its offloaded optimizer
            reads (2: `bf16_master_weights_and_grads`).
        state_bytes: Bytes of an element of the states of these masters (2: `bf16_optimizer_states`).
    """

    name: EngineName = "single"
    num_ranks: int = 1
    gathered_element_bytes: int | None = None
    offloads_weights: bool = False
    offloads_optimizer: bool = False
    max_live_numbers: int = 10**9
    bucket_numbers: int | None = None
    master_bytes: int = 4
    state_bytes: int = 4

    @property
    def weights_dtype(self) -> torch.dtype | None:
        """In which weights are while they are used, where that is not how they are kept."""
        mixes = self.name in ("fsdp2", *_ZERO) and self.gathered_element_bytes == 2
        return torch.bfloat16 if mixes else None

    @property
    def shards_weights(self) -> bool:
        return self.name in ("fsdp2", "zero3")

    @property
    def overlaps_copies(self) -> bool:
        """Whether offloaded weights are copied in ahead. A single rank of FSDP2 copies a unit when it
        runs, on the stream of the kernels (torch 2.13, `FSDPParamGroup.wait_for_unshard`)."""
        return self.name != "fsdp2" or self.num_ranks > 1

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
            host["gradients on the host"] = self._gradients_on_host(every)
        if states is not None and states.is_paged:
            device["optimizer"], host["optimizer, paged"] = 0, optimizer
        return device, host

    def gradients(self, sizes: ModelSizes, parts: Sequence[Weights], *, are_summed: bool = False) -> int:
        """Bytes of the gradients of these weights, once they are reduced.

        Args:
            are_summed: Over micro-batches, of which only the last is reduced, under FSDP2.
        """
        if self._gradients_leave and not (self.name == "fsdp2" and are_summed):
            return 0
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

    def traffic(self, sizes: ModelSizes, states: OptimizerMemory | None) -> HostTraffic:
        """What offloaded weights, gradients and states cost in a step of one micro-batch."""
        every = sizes.all_weights
        into = out = memory = 0
        if self.offloads_weights:
            # Layers come in once for the forward and once for the backward. A frozen embedding has no
            # backward, and FSDP2 keeps the head whole between the two, and a tied embedding.
            once = [] if self.name != "fsdp2" else [sizes.embedding if sizes.is_tied else sizes.head]
            if not sizes.embedding_is_trained and not sizes.is_tied:
                once.append(sizes.embedding)
            into = 2 * self._weights(every) - sum(map(self._weights, once))
        if self.offloads_optimizer:
            numbers, trained = every.num_trainable, every.whole_trainable_bytes
            if self.name == "fsdp2":
                out, memory = (
                    trained,
                    3 * trained + 2 * trained,
                )  # weights, gradients; the norm reads these too
            else:
                element = self._element(every)
                out = (element + self.master_bytes) * numbers  # summed, then as the optimizer reads them
                into += self._share(element * numbers)  # their norm is taken on the device
                memory = (3 * self.master_bytes + element) * numbers
                if not self.offloads_weights:
                    into += self._share(element * numbers)
            out, memory = self._share(out), self._share(memory) + 2 * self._states_bytes(sizes, states)
        return HostTraffic(into=into, out=out, memory=memory)

    def update(self, sizes: ModelSizes, states: OptimizerMemory | None) -> dict[str, int]:
        """While the optimizer runs."""
        trained = sizes.all_weights.whole_trainable_bytes
        share = self.num_ranks if self.name not in ("single", "ddp") else 1
        temporary = 0 if states is None or self.offloads_optimizer else states.update * trained // share
        return {"gradients": self.gradients(sizes, [sizes.all_weights]), "one cell": temporary}

    @property
    def _gradients_leave(self) -> bool:
        """Whether gradients go to the host as soon as they are reduced."""
        return self.offloads_optimizer and self.name in ("fsdp2", "zero2", "zero3")

    def _gradients_on_host(self, every: Weights) -> int:
        """ZeRO-3 has them twice: as they are summed, and as the optimizer reads them."""
        if self.name == "fsdp2":
            return self._share(every.whole_trainable_bytes)
        summed = self._element(every) if self.name == "zero3" else 0
        return self._share(every.num_trainable * (summed + self.master_bytes))

    def _optimizer_bytes(self, sizes: ModelSizes, states: OptimizerMemory | None) -> int:
        """States, and ZeRO's masters."""
        if states is None:
            return 0
        masters = self.master_bytes * sizes.all_weights.num_trainable if self.name in _ZERO else 0
        return self._share(masters) + self._states_bytes(sizes, states)

    def _states_bytes(self, sizes: ModelSizes, states: OptimizerMemory | None) -> int:
        if states is None:
            return 0
        every = sizes.all_weights
        numbers, size = every.num_trainable, every.whole_trainable_bytes
        if self.name in _ZERO:
            size = self.state_bytes * numbers
        found = states.state_bytes(numbers, size, every.factored_numbers)
        return found if self.name in ("single", "ddp") else self._share(found)

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
