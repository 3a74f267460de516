"""What `chunkdist plan` is asked beside the config."""

from __future__ import annotations

from dataclasses import dataclass, replace

from chunkdist.memory.cards import CARDS, GIB, Card
from chunkdist.memory.sharded import EngineName


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """The options of the command, checked.

    Args:
        card: A name in `CARDS`.
        memory_gib: Overrides the card's memory, in GiB.
        host_gib: Host memory for one rank.
        engine, num_ranks: `None`: those of `deepspeed` or `accelerate`, else one process without an engine.
        offload_weights, offload_optimizer: On the host between uses, whatever the files say.
        deepspeed, accelerate: Files that say which engine it is, as `--deepspeed` and `--config_file` of the
            launchers.
        length: Tokens of a row; `None`: the config's `max_length`.
        sequence_parallel: Ranks that share the tokens of a row; `None`: the config's
            `sequence_parallel_size`.
    """

    card: str = "rtx3090"
    memory_gib: float | None = None
    host_gib: float = 64.0
    length: int | None = None
    engine: EngineName | None = None
    num_ranks: int | None = None
    offload_weights: bool = False
    offload_optimizer: bool = False
    deepspeed: str | None = None
    accelerate: str | None = None
    sequence_parallel: int | None = None
    simulate: bool = False

    @property
    def planned_card(self) -> Card:
        card = CARDS[self.card]
        return card if self.memory_gib is None else replace(card, memory_bytes=int(self.memory_gib * GIB))

    def __post_init__(self) -> None:
        for name in ("memory_gib", "length", "num_ranks", "sequence_parallel"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"--{name.replace('_', '-')} {value} plans for nothing: write more than 0")
        if self.host_gib < 0:
            raise ValueError(f"--host-gib {self.host_gib} is less than nothing: write 0 or more")
        given = [name for name in ("engine", "deepspeed", "accelerate") if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(f"--{given[0]} and --{given[1]} both say which engine it is: write one of them")
