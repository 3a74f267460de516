"""Notes the loss of each token that a trainer's model predicts, by its position in its own sequence.

A chunked model's tiles have it, and what TRL's fused head returns, so that nothing is computed for it; of a
plain model with all its logits, they are read once more. No step waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from accelerate.state import GradientState, PartialState  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer

from chunkdist.chunking import is_chunked, observe_losses
from chunkdist.data.streams import NO_LABEL
from chunkdist.engine.method import method_like
from chunkdist.loss.by_position import PositionSums
from chunkdist.loss.cross_entropy import tile_tokens
from chunkdist.loss.token_losses import TokenLosses
from chunkdist.models.layers import causal_lm_of

Observe = Callable[[TokenLosses], None]


class PositionLosses:
    """The sums of `model`'s forwards with labels from construction until `remove`, those of training and of
    evaluation apart.

    Args:
        eval_rows: Rows of an evaluation's batch, the last of which are filled up with rows of the first
            (Accelerate): these count once. `None`: they are not.
        observe: What hands out the losses, and returns what ends that; `None`: the model's forwards.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        eval_rows: int | None,
        observe: Callable[[Observe], Callable[[], None]] | None = None,
    ) -> None:
        self._causal_lm, self._eval_rows = causal_lm_of(model), eval_rows
        self.training, self.evaluation = PositionSums(), PositionSums()
        observe = observe or partial(observe_losses if is_chunked(model) else _observe_plain, self._causal_lm)
        self.remove = observe(self._note)
        """Ends it."""

    def _note(self, found: TokenLosses) -> None:
        if self._causal_lm.training:
            self.training.add(found)
            return
        num_real = self._num_real_rows(found.losses.shape[0])
        if num_real:
            rows = {name: x[:num_real] for name, x in vars(found).items()}
            self.evaluation.add(TokenLosses(**rows))

    def _num_real_rows(self, num_rows: int) -> int:
        """How many of a batch's rows no other batch has (Accelerate 1.15, `gather_for_metrics`). A row of
        several packed samples counts if one of them is real."""
        state = GradientState()
        if self._eval_rows is None or not state.end_of_dataloader or state.remainder <= 0:
            return num_rows
        num_left: int = state.remainder - PartialState().process_index * self._eval_rows
        return min(max(num_left, 0), num_rows)


def position_losses_of(trainer: Trainer) -> Callable[[], PositionLosses] | None:
    """What notes a trainer's losses; `None`: its loss is not the mean of its tokens' cross-entropies, as that
    of transformers' own trainer and TRL's `SFTTrainer` is."""
    names = [kind.__name__ for kind in type(trainer).__mro__ if kind.__module__.startswith("trl.")]
    if trainer.model is None or names[:1] not in ([], ["SFTTrainer"]):
        return None
    observe = getattr(trainer, "observe_losses", None)  # a pipeline's
    rows = trainer.args.per_device_eval_batch_size if observe is None else None
    return partial(PositionLosses, trainer.model, eval_rows=rows, observe=observe)


def _observe_plain(causal_lm: nn.Module, observe: Observe) -> Callable[[], None]:
    """Until the function that is returned is called, `observe` gets what TRL's fused head returns."""
    inner, before = causal_lm.forward, causal_lm.__dict__.get("forward")
    observers = [observe]

    def forward(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        outputs = inner(*args, **kwargs)
        if observers and kwargs.get("labels") is not None:
            found = TokenLosses.of_outputs(outputs, kwargs) or _of_logits(outputs, kwargs)
            if found is not None:
                observe(found)
        return outputs

    # torch.compile leaves this alone, and compiles what is inside
    outer = method_like(inner, torch.compiler.disable(forward, recursive=False), causal_lm)
    causal_lm.__dict__["forward"] = outer

    def end() -> None:
        observers.clear()
        if causal_lm.__dict__.get("forward") is outer:  # else others have wrapped it
            del causal_lm.__dict__["forward"]
            if before is not None:
                causal_lm.__dict__["forward"] = before

    return end


@torch.no_grad()
def _of_logits(outputs: Any, arguments: dict[str, Any]) -> TokenLosses | None:
    """As transformers' `ForCausalLMLoss`, in tiles of tokens; `None`: the logits are not those of all
    tokens."""
    logits, shifted = getattr(outputs, "logits", None), arguments.get("shift_labels")
    targets = F.pad(arguments["labels"], (0, 1), value=NO_LABEL)[:, 1:] if shifted is None else shifted
    if not isinstance(logits, Tensor) or logits.shape[:-1] != targets.shape:
        return None
    targets = targets.to(logits.device)
    tiles = zip(
        *(x.flatten(0, 1).split(tile_tokens(logits.shape[-1], 4)) for x in (logits, targets[..., None])),
        strict=True,
    )
    losses = [F.cross_entropy(x.float(), y[:, 0], ignore_index=NO_LABEL, reduction="none") for x, y in tiles]
    return TokenLosses.of(torch.cat(losses).view(targets.shape), targets != NO_LABEL, arguments)
