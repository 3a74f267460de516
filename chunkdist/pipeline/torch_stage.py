"""torch's `PipelineStage`, with memory for what is received only while it is needed.

torch (2.13) makes the buffers of all micro-batches before a step begins: hidden states and their gradients
of the whole batch. Here a buffer is made when its receive is posted, and is gone with the last that reads it.
The names that are overridden are private, and used here only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.pipelining import PipelineStage

_NOWHERE = torch.device("meta")


class LazyBufferStage(PipelineStage):
    """Its buffers have a shape and no memory, but between receive and use."""

    def _setup_forward_recv_info(self, num_microbatches: int, has_backward: bool) -> None:
        device, self.device = self.device, _NOWHERE
        try:
            super()._setup_forward_recv_info(num_microbatches, has_backward)
        finally:
            self.device = device

    def _create_grad_recv_info(self, act_send_info: Any) -> Any:
        device, self.device = self.device, _NOWHERE
        try:
            return super()._create_grad_recv_info(act_send_info)
        finally:
            self.device = device

    def _get_recv_ops(self, recv_infos: Any) -> Any:
        for info in recv_infos:
            if info.buffer is not None:
                info.buffer = torch.empty_like(info.buffer, device=self.device)
        return super()._get_recv_ops(recv_infos)

    def _retrieve_recv_activations(self, fwd_chunk_id: int) -> Any:
        return self._taken(
            super()._retrieve_recv_activations(fwd_chunk_id), self.args_recv_info[fwd_chunk_id]
        )

    def _retrieve_recv_grads(self, bwd_chunk_id: int) -> Any:
        return self._taken(super()._retrieve_recv_grads(bwd_chunk_id), self.grad_recv_info[bwd_chunk_id])

    def _taken(self, received: Any, recv_infos: Any) -> Any:
        for info in recv_infos:
            if info.buffer is not None:
                info.buffer = torch.empty_like(info.buffer, device=_NOWHERE)
        return received
