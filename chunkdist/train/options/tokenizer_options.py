"""What the options and the data ask of a tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import TrainingArguments

_NOT_PLAIN = {"input_ids", "messages", "conversations"}


def check_end_token(dataset: Any, tokenizer: Any, training: TrainingArguments, *, name: str) -> None:
    """Refuses plain text for a tokenizer without a token to end it: TRL (1.16) puts one behind a sample.

    Raises:
        ValueError: names the model and what to write.
    """
    asked = getattr(training, "eos_token", None)
    if asked is not None:
        if asked not in tokenizer.get_vocab():
            raise ValueError(f"eos_token={asked!r} is no token of the tokenizer of {name!r}: write one")
        return
    if tokenizer.eos_token is not None or _NOT_PLAIN & set(dataset.column_names):
        return
    if "prompt" in dataset.column_names and isinstance(dataset[0]["prompt"], list):
        return  # messages: their template ends them
    raise ValueError(
        f"the tokenizer of {name!r} has no eos_token to end a sample with: write eos_token, a token that it "
        "has"
    )
