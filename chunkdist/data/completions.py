"""`completion_only_loss` where there are no completions: TRL (1.16) would train on every token unsaid."""

from __future__ import annotations

from collections.abc import Iterable

INSTEAD = {
    "messages": "write assistant_only_loss: true, which trains on the assistant's turns alone, or samples "
    "with 'prompt' and 'completion'",
    "tokens": "write samples with 'labels' or 'completion_mask' beside 'input_ids'",
}


def refuse_without_completions(columns: Iterable[str], kind: str, *, name: str) -> None:
    """Passes samples whose prompts can be told apart.

    Raises:
        ValueError: they cannot.
    """
    is_masked = kind == "tokens" and not {"labels", "completion_mask"}.isdisjoint(columns)
    if kind != "prompt_completion" and not is_masked:
        instead = INSTEAD.get(kind, "write samples with 'prompt' and 'completion'")
        raise ValueError(
            f"completion_only_loss=True needs samples with 'prompt' and 'completion', {name!r} has {kind}: "
            f"{instead}, or false to train on every token"
        )
