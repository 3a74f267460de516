"""The loss of each token of a forward, for those who look at more than the mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from chunkdist.stream.positions import positions_in_sequences


@dataclass(frozen=True, kw_only=True)
class TokenLosses:
    """Cross-entropies of one forward's tokens, without a graph, on its device: (B, T) each, or (B, T - 1).
    A loss is where its token is predicted: at the token before.

    Args:
        losses: In at least fp32; 0 where there is no label.
        has_label: Whether there is one.
        positions: Of the tokens that are predicted, in their own sequences, from 0.
    """

    losses: Tensor
    has_label: Tensor
    positions: Tensor

    @classmethod
    def of(cls, losses: Tensor, has_label: Tensor, arguments: Mapping[str, Any]) -> TokenLosses:
        """Args:
        arguments: Of the forward, by name: they say where sequences begin.
        """
        shifted, labels = arguments.get("shift_labels"), arguments.get("labels")
        whole: Tensor = labels if shifted is None else shifted  # type: ignore[assignment]
        positions, _ = positions_in_sequences(arguments, (losses.shape[0], whole.shape[1]), losses.device)
        positions = positions.to(losses.device)[:, : losses.shape[1]] + 1
        return cls(losses=losses, has_label=has_label, positions=positions)

    @classmethod
    def of_outputs(cls, outputs: Any, arguments: Mapping[str, Any]) -> TokenLosses | None:
        """Of what TRL's fused head returns (1.16); `None`: these outputs have no number for each token."""
        log_probs, mask = getattr(outputs, "log_probs", None), getattr(outputs, "label_mask", None)
        if not isinstance(log_probs, Tensor) or log_probs.ndim != 2 or not isinstance(mask, Tensor):
            return None
        return cls.of(-log_probs.detach(), mask, arguments)
