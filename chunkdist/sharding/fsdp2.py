"""FSDP2: the units of a group's layers are whole while the group runs, at no more all-gathers than without
chunks.

Two ways of cutting a model fit a group of several layers. One unit for the group, `fully_shard([...])`, needs
nothing. One unit a layer, as Accelerate cuts: all but the last layer's are released before the group runs,
inside the call of its last layer. So they are told to stay whole, and are released when the group has run;
its backward puts them together again before FSDP2 would.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from chunkdist.sharding.refuse_sequence import refuse_mesh


def refuse_inner_units(layer: nn.Module) -> None:
    """Raises where a layer holds units: their weights would be gathered once a chunk.

    Raises:
        ValueError: a module inside the layer is a unit of its own.
    """
    for path, module in layer.named_modules():
        if module is not layer and isinstance(module, FSDPModule):
            raise ValueError(
                f"fully_shard was applied to {path!r} inside {type(layer).__name__}: a chunked layer would "
                "gather it once a chunk, and ranks with other numbers of chunks would wait forever; apply "
                "fully_shard to whole layers"
            )


def device_of(model: nn.Module) -> torch.device:
    """Where a model runs. Weights that FSDP2 has offloaded lie on the host, and its mesh tells."""
    parameter = next(model.parameters())
    if isinstance(parameter, DTensor):
        return torch.device(parameter.device_mesh.device_type)
    return parameter.device


class GroupUnits:
    """The units that FSDP2 releases before the group runs: those of all its layers but the last.

    Args:
        layers: The group's layers, in their order.
        may_be_larger: Whether a unit may have layers of several groups.
        shares_rows: Whether ranks share the tokens of a row: then a mesh may have a dim for that.

    Raises:
        ValueError: a unit has layers of several groups, and may not; or its mesh has a dim along which
        sequences are
            cut.
    """

    def __init__(
        self, layers: Sequence[nn.Module], *, may_be_larger: bool = False, shares_rows: bool = False
    ) -> None:
        if not may_be_larger:
            _refuse_units_across_groups(layers)
        own = _unit_state(layers[-1])
        for group in getattr(own, "_fsdp_param_groups", ()):
            if not shares_rows:
                refuse_mesh(group.mesh_info.mesh)
        self._units: list[FSDPModule] = []
        for layer in layers[:-1]:
            if isinstance(layer, FSDPModule) and _unit_state(layer) is not own:
                self._units.append(layer)
        self._released = [unit for unit in self._units if _reshards_after_forward(unit)]

    def keep(self) -> None:
        """Called before the first layer's call ends: the units stay whole."""
        for unit in self._released:
            unit.set_reshard_after_forward(False, recurse=False)

    def release(self) -> None:
        """Called when the group has run; undoes `keep`."""
        for unit in self._released:
            unit.set_reshard_after_forward(True, recurse=False)
            unit.reshard()

    def gather(self) -> None:
        """For the group's backward; each unit's own backward hooks reduce and release it afterwards."""
        for unit in self._units:
            unit.unshard()


def _refuse_units_across_groups(layers: Sequence[nn.Module]) -> None:
    for layer in layers:
        if not isinstance(layer, FSDPModule):
            continue
        unit = [module for module in layer._get_fsdp_state()._modules if type(module) is type(layer)]
        if any(all(module is not own for own in layers) for module in unit):
            raise ValueError(
                f"fully_shard was applied to {len(unit)} decoder layers as one unit, and layers_per_group="
                f"{len(layers)} puts them into several groups: apply it to the list of a group's layers, or "
                "to each layer"
            )


def _unit_state(module: nn.Module) -> object:
    return module._get_fsdp_state() if isinstance(module, FSDPModule) else None


def _reshards_after_forward(unit: FSDPModule) -> bool:
    groups = unit._get_fsdp_state()._fsdp_param_groups  # torch has no public way to ask (2.13)
    return any(group.post_forward_mesh_info is not None for group in groups)
