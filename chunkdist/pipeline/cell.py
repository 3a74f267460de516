"""A cell of a pipeline as one autograd node: one chunk on the layers of one stage.

The same as in a layer group (`chunkdist.engine.group`): the chunk runs without a graph and is run again in
the backward, unless its graph is retained; K/V and their gradients lie in the stores of the chunk's dependent
run; the random numbers and autocast of the rerun are those of the first run; gradients of parameters are
summed inside and come out once a step. But what a node takes and gives is one chunk, and the order is the
pipeline's.

On the last stage a cell ends with the loss. Its head runs in the backward only, once: until then neither
logits nor their gradients exist, however many chunks wait.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from chunkdist.engine.cell import CellGraph, CellOutput, rerun, retain
from chunkdist.pipeline.cell_inputs import CellInputs
from chunkdist.pipeline.stage import ModelStage
from chunkdist.replay import AutocastState, RngState, undisturbed_rng


@dataclass(kw_only=True)
class StageCell(CellInputs):
    """A micro-batch from its forward to its backward.

    Args:
        number: Of the micro-batch.
        is_last_backward: Whether the gradients of parameters come out with its own.
    """

    stage: ModelStage
    number: int
    retained: bool
    is_last_backward: bool
    _graph: CellGraph | None = field(default=None, init=False)
    _rng: RngState = field(init=False)
    _autocast: AutocastState = field(init=False)

    def run(self, received: Tensor | None) -> Tensor:
        """The cell as a node. (1, C, H) to the same; on the last stage, to a placeholder of its loss.

        Args:
            received: The hidden states from the stage before; `None` on the first one.
        """
        anchor = torch.zeros((), requires_grad=True)  # the first stage may have nothing to train
        parameters = self.stage.parameters_of_step.trainable
        output: Tensor = _CellFunction.apply(self, received, anchor, *parameters)  # type: ignore[no-untyped-call]
        return output

    def forward(self, received: Tensor | None) -> Tensor:
        like = self.model_inputs["input_ids"] if received is None else received
        self._rng, self._autocast = RngState.capture(like), AutocastState.capture(like.device.type)
        self.keeps_attention = not self.retained
        if self.retained:
            leaf = self._leaf(received)
            self._graph = retain(leaf, self._run_layers, self.stage.parameters_of_step)
            output = self._graph.output.hidden.detach()
        else:
            output = self._run_plainly(received)
            self.stage.witness.note(self.number, output)
        self._hand_on()
        return output.new_zeros(()) if self.stage.is_last else output

    def evaluate(self, received: Tensor | None) -> Tensor:
        """Without a backward to come: (1, C, H) to the same; on the last stage, to the loss."""
        with torch.no_grad():
            output = self._run_plainly(received)
            self._hand_on()
            if not self.stage.is_last:
                return output
            self.result = output
            return self.stage.run_head(self)

    def _run_plainly(self, received: Tensor | None) -> Tensor:
        self.hidden, self.relays = received, []
        return self.stage.run_layers(self)

    def _hand_on(self) -> None:
        """The state in which the chunk ends, to the next chunk of its run."""
        for relay in self.relays:
            if relay.used and self.chunk.end < self.stream.num_tokens:
                relay.hand_on((self.chunk.end,))
        self.relays = []

    def backward(self, received: Tensor | None, grad_output: Tensor) -> Tensor | None:
        """Adds to the gradients of parameters and prefix; returns that of `received`, (1, C, H)."""
        like = self.model_inputs["input_ids"] if received is None else received
        graph, self._graph = self._graph, None
        with undisturbed_rng(like), torch.enable_grad(), self._autocast.apply():
            if graph is None:
                self._rng.restore()
                leaf = self._leaf(received)
                graph = rerun(leaf, self._run_layers, self.stage.parameters_of_step)
                self.stage.witness.compare(self.number, graph.output.hidden)
            if self.stage.is_last:
                grad_output = self._backward_of_loss(graph.output.hidden)
            grad = graph.backward(grad_output)
            for relay in graph.output.relays:
                relay.forget()
            for stores in self.stores:
                if stores.attention is not None:
                    stores.attention.forget(self.chunk.start)
        if self.is_last_backward:
            self.stage.end_step()
        self.stores = []  # of a pipeline of one stage, torch keeps the node until the step ends
        return grad

    def _leaf(self, received: Tensor | None) -> Tensor | None:
        self.hidden, self.relays = None if received is None else received.detach().requires_grad_(), []
        return self.hidden

    def _run_layers(self) -> CellOutput:
        return CellOutput(self.stage.run_layers(self), self.relays)

    def _backward_of_loss(self, output: Tensor) -> Tensor:
        """The gradient of what the layers end with. The head's graph is gone when theirs is needed."""
        self.result = output.detach().requires_grad_()
        with self.stage.parameters_of_step.aliased():
            loss = self.stage.run_head(self)
        if loss.requires_grad:
            loss.backward()
        self.stage.losses.append(loss.detach())
        grad, self.result = self.result.grad, None
        return torch.zeros_like(output) if grad is None else grad


class _CellFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, cell: StageCell, received: Tensor | None, anchor: Tensor, *parameters: Tensor
    ) -> Tensor:
        ctx.cell = cell
        ctx.save_for_backward(*(() if received is None else (received,)))
        return cell.forward(received)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        cell: StageCell = ctx.cell
        (received,) = ctx.saved_tensors or (None,)
        grad_received = cell.backward(received, grad_output)
        parameters = cell.stage.parameters_of_step
        grads = parameters.take_grads() if cell.is_last_backward else (None,) * len(parameters.trainable)
        return None, grad_received, None, *grads
