"""The sequence group of DeepSpeed's Ulysses, on its own or through Accelerate (`sp_size`).

DeepSpeed puts a function of its own in the place of transformers' attention. A chunked model does not call
it, and exchanges in its own, in the same group. Nothing is imported for that: what has not been imported has
made no group.

Private names, seen in deepspeed 0.19 and accelerate 1.15: `groups.mpu`, `groups.mesh_device`,
`parallel_state_sp._SEQUENCE_PARALLEL_GROUP` and `AcceleratorState._shared_state`.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import Any

from torch import distributed

from chunkdist.sharding.sequence import SequenceGroup

_MESH_DIM = "sequence_parallel"
"""The dim for sequences of the mesh that DeepSpeed makes."""


def trainer_group() -> SequenceGroup | None:
    """The group, if it has several ranks.

    Raises:
        ValueError: Accelerate was told of one that nobody has made.
    """
    group = _deepspeed_group()
    if group is not None and group.size() > 1:
        return _wrapped(group)
    state = getattr(sys.modules.get("accelerate.state"), "AcceleratorState", None)
    config = getattr(state, "_shared_state", {}).get("parallelism_config")
    if (size := getattr(config, "sp_size", None) or 1) > 1:
        raise ValueError(
            f"Accelerate's parallelism_config has sp_size={size}, and DeepSpeed has made no group of as many "
            "ranks: train with DeepSpeed, whose Trainer makes it, or write sp_size=1 and pass "
            "chunk_model(..., sequence_group=group)"
        )
    return None


@lru_cache(maxsize=1)
def _wrapped(group: Any) -> SequenceGroup:
    return SequenceGroup(group)


def _deepspeed_group() -> Any:
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    state = sys.modules.get("deepspeed.runtime.sequence_parallel.parallel_state_sp")
    if (group := getattr(state, "_SEQUENCE_PARALLEL_GROUP", None)) is not None:
        return group
    groups = sys.modules.get("deepspeed.utils.groups")
    mpu: Any = getattr(groups, "mpu", None)
    mesh: Any = getattr(groups, "mesh_device", None)
    if hasattr(mpu, "get_sequence_parallel_group"):
        try:
            return mpu.get_sequence_parallel_group()
        except AssertionError:  # it knows the question, and has made no such group
            return None
    if _MESH_DIM in (getattr(mesh, "mesh_dim_names", None) or ()):
        return mesh.get_group(mesh_dim=_MESH_DIM)
    return None
