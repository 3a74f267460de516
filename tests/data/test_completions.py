"""`completion_only_loss` without completions is refused, in a line that says what to write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from chunkdist.data.completions import refuse_without_completions
from chunkdist.train.build import build_trainer
from chunkdist.train.options.arguments import parse_options
from tests.helpers.tiny_run import ASSISTANT, CHAT_TEMPLATE, TEXTS, USER, command_line


@pytest.mark.parametrize(
    ("rows", "instead"),
    [
        (TEXTS[:1], "has text: write samples with 'prompt' and 'completion'"),
        ([{"messages": [USER, ASSISTANT]}], "has messages: write assistant_only_loss: true"),
        ([{"input_ids": [1, 2, 3]}], "has tokens: write samples with 'labels' or 'completion_mask'"),
    ],
)
def test_prompts_that_cannot_be_told_apart(tiny_model: Path, rows: list[Any], instead: str) -> None:
    template = tiny_model.parent / "template.jinja"
    template.write_text(CHAT_TEMPLATE)
    given = command_line(tiny_model, rows, completion_only_loss=True, chat_template_path=template)
    with pytest.raises(ValueError, match=f"completion_only_loss=True needs .*{instead}") as refused:
        build_trainer(parse_options(given))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("columns", "kind"),
    [
        (["prompt", "completion"], "prompt_completion"),
        (["input_ids", "labels"], "tokens"),
        (["input_ids", "completion_mask"], "tokens"),
    ],
)
def test_prompts_that_can(columns: list[str], kind: str) -> None:
    refuse_without_completions(columns, kind, name="data")
