"""The states of an optimizer, by the name that `TrainingArguments.optim` gives it."""

from __future__ import annotations

from dataclasses import dataclass

_BLOCK = 256
"""bitsandbytes quantises states in blocks of so many numbers, each with one fp32 scale (bitsandbytes 0.43,
optim/optimizer.py: `blocksize=256`)."""
_EIGHT_BIT = 1 + 4 / _BLOCK


@dataclass(frozen=True, kw_only=True)
class OptimizerMemory:
    """What an optimizer keeps.

    Args:
        own: States in the parameter's own dtype, for each number of it.
        fixed_bytes: Bytes of states for each number, whatever its dtype.
        is_factored: Whether a matrix has one fp32 number for each row and each column.
        is_paged: Whether they lie in managed memory, which leaves the GPU when it is full.
        update: Temporary numbers for each trained number during the update, in the parameter's dtype.
    """

    own: int = 0
    fixed_bytes: float = 0.0
    is_factored: bool = False
    is_paged: bool = False
    update: int = 0

    def state_bytes(self, num_numbers: int, num_bytes: int, factored_numbers: int) -> int:
        """For so many numbers, of so many bytes in all.

        Args:
            factored_numbers: Rows and columns of matrices, and numbers of vectors.
        """
        factored = 4 * factored_numbers if self.is_factored else 0
        return self.own * num_bytes + round(self.fixed_bytes * num_numbers) + factored

    @staticmethod
    def named(name: str) -> OptimizerMemory | None:
        """`None`: not known."""
        return _NAMED.get(name)


_ADAM_8BIT = OptimizerMemory(fixed_bytes=2 * _EIGHT_BIT)
_LION_8BIT = OptimizerMemory(fixed_bytes=_EIGHT_BIT)
# Sources: torch/optim/adamw.py (states as the parameter; the for-each update has one temporary of that size),
# bitsandbytes (32-bit states in fp32 whatever the parameter; 8-bit in blocks), transformers'
# trainer_optimizer.py (which class a name means) and optimization.py (Adafactor: factored second moment, no
# first one by default).
_NAMED: dict[str, OptimizerMemory] = {
    "adamw_torch": OptimizerMemory(own=2, update=1),
    "adamw_torch_fused": OptimizerMemory(own=2),
    "sgd": OptimizerMemory(),
    "rmsprop": OptimizerMemory(own=1, update=1),
    "adagrad": OptimizerMemory(own=1, update=1),
    "adafactor": OptimizerMemory(is_factored=True),
    "adamw_bnb_8bit": _ADAM_8BIT,
    "adamw_8bit": _ADAM_8BIT,
    "paged_adamw_8bit": OptimizerMemory(fixed_bytes=2 * _EIGHT_BIT, is_paged=True),
    "paged_adamw_32bit": OptimizerMemory(fixed_bytes=8, is_paged=True),
    "lion_8bit": _LION_8BIT,
    "paged_lion_8bit": OptimizerMemory(fixed_bytes=_EIGHT_BIT, is_paged=True),
    "lion_32bit": OptimizerMemory(fixed_bytes=4),
    "paged_lion_32bit": OptimizerMemory(fixed_bytes=4, is_paged=True),
}
