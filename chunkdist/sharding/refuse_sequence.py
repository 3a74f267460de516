"""Sequence and context parallelism by other hands, which a chunked model does not take part in; what it does
is in `sequence`.

Ranks of such a group hold parts of one sequence and exchange keys and values inside the attention that they
replace. A chunked model calls its own: each rank would attend to its own part alone, and gradients would be
off by a third, with nothing said. So it is refused wherever it can be seen; nothing of a library is imported
for that, what has not been imported does nothing.

Private names, seen in torch 2.13, accelerate 1.15, transformers 5.23 and deepspeed 0.19: the handlers of
`DTensor._op_dispatcher`, `AcceleratorState._shared_state`, and DeepSpeed's `groups.mpu`.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_DIM = re.compile(r"^(cp|sp|seq|ring|ulysses)(_|$)|_(cp|sp|seq)$|sequence|context|ulysses")
"""Names of mesh dims along which a sequence is cut."""
_JOINT = frozenset(("dp_shard_cp", "dp_cp"))
"""Dims that Accelerate flattens others into; their root tells whether one for sequences is among them."""
_STANDARD = re.compile(r"^(sdpa|eager|flex_attention|flash_attention_\d)$")
"""Names under which transformers registers its own attention functions."""
Found = tuple[str, str] | None
"""What was set, and what to do about it."""
_ENVIRONMENT = {"cp_size": "PARALLELISM_CONFIG_CP_SIZE", "sp_size": "PARALLELISM_CONFIG_SP_SIZE"}


def refuse_sequence_parallelism(
    configs: Iterable[PreTrainedConfig] = (), modules: Iterable[nn.Module] = ()
) -> None:
    """Raises where sequences are, or will be, cut between ranks by something else than chunkdist.

    Args:
        configs: Config objects from which the model's modules read their attention implementation.
        modules: Looked at for parameters on a mesh with such a dim, and for attention modules that exchange.

    Raises:
        ValueError: it names what was set, and what to write.
    """
    found = _of_accelerate() or _of_deepspeed() or _of_torch() or _of_functions(configs)
    for module in modules:
        found = found or _of_module(module)
    if found:
        what, instead = found
        raise ValueError(
            f"{what}: each rank would hold a part of the sequence, and a chunked model attends to what is on "
            f"its own rank, or on those of chunk_model(..., sequence_group=group); {instead}, and let every "
            "rank have whole sequences (chunks bound their memory), or that group's parts of them"
        )


def refuse_mesh(mesh: Any) -> None:
    """Raises where a model is sharded along a mesh dim for sequences.

    Raises:
        ValueError: names the dim.
    """
    if dim := _sequence_dim(mesh):
        raise ValueError(
            f"the model is on a device mesh with the dim {dim!r}: each rank would hold a part of the "
            "sequence, and a chunked model attends to what is on its own rank; make the mesh of "
            "data-parallel dims only"
        )


def refuse_parallelism_config(config: Any, deepspeed: Any = None) -> None:
    """The same from a trainer's options, before a model is loaded.

    Args:
        config: Accelerate's `ParallelismConfig`, or what was written in its place; `None`: the environment of
            `accelerate launch` counts.
        deepspeed: The trainer's DeepSpeed config; `None` without DeepSpeed.

    Raises:
        ValueError: it names what was set, and what to write.
    """
    from_launcher = os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() == "true"
    for name, variable in _ENVIRONMENT.items():
        given = config.get(name) if isinstance(config, dict) else getattr(config, name, None)
        if config is None and from_launcher:
            given = os.environ.get(variable)
        if given is not None and str(given) != "1":
            raise ValueError(_of_size("parallelism_config", name, given))
    size = None if deepspeed is None else deepspeed.get_value("sequence_parallel_size")
    if isinstance(size, int) and size > 1:
        raise ValueError(_of_size("the DeepSpeed config", "sequence_parallel_size", size))


def _of_size(where: str, name: str, size: Any) -> str:
    return (
        f"{name}={size} in {where} gives each rank a part of the sequence, and a chunked model attends to "
        f"what is on its own rank; write {name}: 1, and sequence_parallel_size: {size} in the YAML for ranks "
        "that share rows"
    )


def _of_accelerate() -> Found:
    state = getattr(sys.modules.get("accelerate.state"), "AcceleratorState", None)
    shared = getattr(state, "_shared_state", {})
    config = shared.get("parallelism_config")
    if (size := getattr(config, "cp_size", None) or 1) > 1:
        return f"Accelerate's parallelism_config has cp_size={size}", "write cp_size=1"
    if dim := _sequence_dim(shared.get("device_mesh")):
        return f"Accelerate's device mesh has the dim {dim!r}", "leave that dim out"
    return None


def _of_deepspeed() -> Found:
    """Another library's groups, handed to DeepSpeed. Those that it has made itself are `trainer_group`."""
    mpu = getattr(sys.modules.get("deepspeed.utils.groups"), "mpu", None)
    size = getattr(mpu, "get_context_parallel_world_size", lambda: 1)()
    if size > 1:
        return f"DeepSpeed's mpu has a context-parallel group of {size} ranks", "leave it out"
    return None


def _of_torch() -> Found:
    """torch's own dispatch: its handlers of attention, which are there while it is on, in all versions."""
    name = "torch's context_parallel is active"
    handlers = getattr(getattr(DTensor, "_op_dispatcher", None), "_custom_op_handlers", {})
    if torch.ops.aten._scaled_dot_product_flash_attention.default in handlers:
        return name, "leave the context manager out"
    replaced = getattr(F.scaled_dot_product_attention, "__globals__", {}).get("__name__", "")
    if "tensor.experimental" in replaced:
        return name, "leave the context manager out"
    if torch._C._len_torch_function_stack():
        modes = torch.overrides._get_current_function_mode_stack()
        if any("tensor.experimental" in type(mode).__module__ for mode in modes):  # torch before 2.8
            return name, "leave the context manager out"
    return None


def _of_functions(configs: Iterable[PreTrainedConfig]) -> Found:
    """Attention functions that the model would call, had it no chunks, and that are not transformers' own."""
    for config in configs:
        name = getattr(config, "_attn_implementation", None)
        if not isinstance(name, str):
            continue
        home = _home_of(ALL_ATTENTION_FUNCTIONS.get(name))
        is_known = home.startswith(("transformers.", "deepspeed.runtime.sequence_parallel."))
        is_replaced = _STANDARD.match(name) or home.startswith("deepspeed.")
        if is_replaced and not is_known:  # DeepSpeed's shares rows in a group that chunks share, too
            what = f"the attention function {name!r} of transformers has been replaced by one of {home}"
            return what, "do not register it"
        sdpa = F.scaled_dot_product_attention
        if name == "sdpa" and hasattr(sdpa, "__globals__"):  # torch's own is a builtin
            what = f"torch's scaled_dot_product_attention has been replaced by one of {_home_of(sdpa)}"
            return what, "put it back"
    return None


def _home_of(function: Any) -> str:
    """The module in which the code was written; `functools.wraps` hides it."""
    function = getattr(function, "func", function)
    if function is None:
        return "transformers."
    home = getattr(function, "__globals__", {}).get("__name__") or type(function).__module__
    return str(home)


def _of_module(module: nn.Module) -> Found:
    for submodule in module.modules():
        home = type(submodule).__module__
        if home.startswith(("deepspeed.sequence", "deepspeed.runtime.sequence_parallel")):
            return f"{type(submodule).__name__} of {home} is in the model", "take it out"
    for parameter in module.parameters():
        if isinstance(parameter, DTensor):
            dim = _sequence_dim(parameter.device_mesh)
            return (f"the model is on a mesh with the dim {dim!r}", "leave that dim out") if dim else None
    return None


def _sequence_dim(mesh: Any) -> str | None:
    """The name of a mesh's dim, or of one of the mesh that it is a part of, along which sequences are cut."""
    if mesh is None:
        return None
    root = getattr(mesh, "_get_root_mesh", lambda: mesh)() or mesh
    for each in (mesh, root):
        for name in getattr(each, "mesh_dim_names", None) or ():
            if _DIM.search(name) and name not in _JOINT and _mesh_size(each, name) > 1:
                return str(name)
    return None


def _mesh_size(mesh: Any, name: str) -> int:
    return int(mesh.size(mesh.mesh_dim_names.index(name)))
