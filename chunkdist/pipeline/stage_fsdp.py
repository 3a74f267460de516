"""FSDP2 within a stage: its weights, gradients and optimizer states are spread over the ranks that have the
same stage in other pipelines.

A stage's weights are gathered once a step, before its first cell, and reduced and released once, after its
last: how many cells a rank runs, and in which order, is nothing that other ranks must know. So the units are
made of modules that hold the layers and are never called: none of FSDP2's hooks runs within a cell.
Between the two a stage holds its weights and gradients whole, as with ZeRO-1.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard


class StageShards:
    """The units of a stage: one a layer, and one of what else it has.

    Args:
        layers: The stage's layers.
        mesh: One-dimensional: the ranks that share the weights.
    """

    def __init__(self, model: nn.Module, layers: Sequence[nn.Module], mesh: DeviceMesh) -> None:
        of_layers = {parameter for layer in layers for parameter in layer.parameters()}
        self._units: list[FSDPModule] = []
        if any(parameter not in of_layers for parameter in model.parameters()):
            self._units.append(fully_shard(_Unit(model), mesh=mesh, ignored_params=of_layers))
        self._units += [fully_shard(_Unit(layer), mesh=mesh) for layer in layers]
        for unit in self._units:
            unit.set_gradient_divide_factor(1.0)  # losses are parts of the global batch's
            unit.set_force_sum_reduction_for_comms(True)  # gloo has no other
            unit._get_fsdp_state()._lazy_init()

    def gather(self) -> None:
        """The stage's parameters are whole. Collective."""
        handles = [unit.unshard(async_op=True) for unit in self._units]
        for handle in handles:
            if handle is not None:
                handle.wait()

    def reduce(self) -> None:
        """Sums gradients over the ranks, and releases the weights. Collective; all ranks have a gradient of
        the same parameters.

        What torch's own pipeline runtime does at a step's end: torch (2.13) has no public name for it.
        """
        for unit in self._units:
            state = unit._get_fsdp_state()
            for group in state._fsdp_param_groups:
                group.post_backward()
            state._root_post_backward_final_callback()

    def release(self) -> None:
        """The weights of a step that failed, too."""
        for unit in self._units:
            unit.reshard()


class _Unit(nn.Sequential):
    """Holds a module, and is never called."""
