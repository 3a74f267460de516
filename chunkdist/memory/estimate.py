"""What a step needs of memory, by formula: the moments at which it may have its peak, each a sum of terms.

Sequence terms follow from the schedule, one cell's graph from `chunkdist.memory.cell_sizes`, weights and what
engines gather from `chunkdist.memory.sharded`. docs/memory.md has the formula in words. Left out is what an
allocator takes for itself; `chunkdist.memory.simulate` counts a step of the real code.
"""

from __future__ import annotations

from dataclasses import dataclass

from chunkdist.config import ChunkConfig
from chunkdist.memory.allgather_bytes import Parts
from chunkdist.memory.model_sizes import ModelSizes
from chunkdist.memory.optimizers import OptimizerMemory
from chunkdist.memory.sharded import SINGLE, Engine
from chunkdist.memory.step_peaks import StepMoments

FIXED = ("weights", "narrow weights", "gradients", "optimizer", "gathered weights", "collectives")
SEQUENCE = (
    *("group inputs", "hidden states", "keys and values", "K/V gradients", "attention's backward"),
    *("states", "attention's outputs", "positions", "router logits"),
)
CELLS = ("one cell", "retained cells", "loss tile")
FIXED_ON_HOST = ("weights on the host", "optimizer on the host", "gradients on the host", "optimizer, paged")
"""Beside these, the host has what waits for the backward: written once in a step, and read once."""


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes of one rank at the peak of a step.

    Args:
        moment: Where in the step the peak is.
        device, host: Bytes by name, on the device at that moment and on the host in all.
        moments: The peak of each moment.
        num_tokens: Tokens of all rows.
        is_complete: False: the optimizer's states are not known, and not counted.
    """

    moment: str
    device: Parts
    host: Parts
    moments: dict[str, int]
    num_tokens: int
    is_complete: bool

    @property
    def peak_bytes(self) -> int:
        return sum(self.device.values())

    @property
    def host_bytes(self) -> int:
        return sum(self.host.values())

    @property
    def waiting_bytes(self) -> int:
        """What is on the host from the forward to the backward."""
        return sum(size for name, size in self.host.items() if name not in FIXED_ON_HOST)

    @property
    def step_bytes(self) -> int:
        """What comes to the weights."""
        return self.peak_bytes - self.device["weights"]

    @property
    def sequence_bytes(self) -> int:
        """What grows with the sequence."""
        return sum(self.device.get(name, 0) for name in SEQUENCE)

    @property
    def sequence_bytes_per_token(self) -> int:
        return self.sequence_bytes // self.num_tokens


def estimate_memory(
    sizes: ModelSizes,
    config: ChunkConfig,
    *,
    num_tokens: int,
    num_rows: int = 1,
    engine: Engine = SINGLE,
    optimizer: str = "",
    num_micro_batches: int = 1,
) -> MemoryEstimate:
    """Expected memory of a training step.

    Args:
        config: Without `"auto"` in `chunk_size`, `layers_per_group` and `offload`; an unresolved
            `retained_chunks` counts as 0, an unresolved `keep_attention` as False.
        num_tokens: Tokens of a row.
        num_rows: Rows of a micro-batch.
        optimizer: As in `TrainingArguments.optim`.
        num_micro_batches: Micro-batches of a step: with several, all gradients are there while the second one
            runs.
    """
    step = StepMoments(sizes, config, num_tokens, num_rows, engine, num_micro_batches)
    states = OptimizerMemory.named(optimizer)
    fixed, host = engine.between_steps(sizes, states)
    moments: dict[str, Parts] = {}
    for name, parts in step.moments():
        parts = {**fixed, **parts}
        if name not in moments or sum(parts.values()) > sum(moments[name].values()):
            moments[name] = parts
    update = engine.update(sizes, states)
    moments["the optimizer"] = {**fixed, **update}
    peaks = {name: sum(parts.values()) for name, parts in moments.items()}
    moment = max(peaks, key=lambda name: peaks[name])
    return MemoryEstimate(
        moment=moment,
        device={name: size for name, size in moments[moment].items() if size or name == "weights"},
        host={name: size for name, size in {**host, **step.host()}.items() if size},
        moments=peaks,
        num_tokens=num_tokens * num_rows,
        is_complete=states is not None,
    )
