"""Values that samples must have, looked at before they are tokenised; each fault is a short text.

`token_fault` looks at columns of token ids without a Python object a token, `text_fault` at one sample of
text or messages.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from chunkdist.data.ragged import flat, is_ragged, row_of

MASKS = ("attention_mask", "completion_mask", "assistant_masks")
TOKEN_COLUMNS = ("input_ids", "labels", *MASKS, "seq_lengths")
_WORDS = {
    str: "text",
    bool: "a truth value",
    int: "a number",
    float: "a number",
    list: "a list",
    dict: "a mapping",
}


def text_fault(sample: Mapping[str, Any], columns: Sequence[str]) -> str | None:
    """What is wrong with a sample of text, of a prompt and a completion, or of messages.

    Args:
        columns: Those that are trained on: one, or `prompt` and `completion`.
    """
    values = {column: sample.get(column) for column in columns}
    for column, value in values.items():
        if value is None or (isinstance(value, list) and not value):
            return f"{column!r} is empty"
    if len(columns) == 2:
        kinds = {column: isinstance(value, list) for column, value in values.items()}
        if len(set(kinds.values())) > 1:
            has_messages = next(column for column, is_list in kinds.items() if is_list)
            other = next(column for column in columns if column != has_messages)
            return (
                f"{other!r} is {_word(values[other])}, but {has_messages!r} is a list: write both as text or "
                "both as messages"
            )
    for column, value in values.items():
        is_chat = column in ("messages", "conversations") or (len(columns) == 2 and isinstance(value, list))
        fault = _messages_fault(value, column) if is_chat else _plain_fault(value, column)
        if fault is not None:
            return fault
    return None


def _plain_fault(value: Any, column: str) -> str | None:
    if not isinstance(value, str):
        return f"{column!r} is {_word(value)}, not text: write a string"
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        return f"{column!r} holds half a surrogate pair ({half!r}), which is no character: take it out"
    return None


def _messages_fault(value: Any, column: str) -> str | None:
    if not isinstance(value, list):
        return f"{column!r} is {_word(value)}, not a list of messages"
    role, content = ("from", "value") if column == "conversations" else ("role", "content")
    for number, message in enumerate(value):
        where = f"message {number} of {column!r}"
        if not isinstance(message, dict):
            return f"{where} is {_word(message)}, not a mapping with {role!r} and {content!r}"
        if message.get(role) is None:
            other = {"messages": "conversations", "conversations": "messages"}.get(column)
            if other is not None and message.get("from" if column == "messages" else "role") is not None:
                return f"{where} has {' and '.join(map(repr, message))}: call the column {other!r}"
            return f"{where} has no {role!r}"
        if not isinstance(message[role], str):
            return f"the {role!r} of {where} is {_word(message[role])}, not text"
        said = message.get(content)
        if said is None and not any(
            message.get(key) for key in ("tool_calls", "reasoning_content", "thinking")
        ):
            return f"{where} has no {content!r}"
        is_parts = isinstance(said, list) and all(isinstance(part, dict) for part in said)
        if said is not None and not isinstance(said, str) and not is_parts:
            return f"the {content!r} of {where} is {_word(said)}, not text"
        if isinstance(said, str) and (fault := _plain_fault(said, column)) is not None:
            return fault
    return None


def token_fault(table: Any) -> tuple[int, str] | None:
    """The first row of an Arrow table that is no sample of token ids, and what is wrong with it.

    Args:
        table: Some of `TOKEN_COLUMNS`, `input_ids` among them.
    """
    faults = []
    for column in table.column_names:
        fault = _list_fault(table[column], column)
        if fault is not None:
            faults.append(fault)
    if faults:
        return min(faults)
    lengths = np.diff(flat(table["input_ids"])[0])
    for column in table.column_names:
        offsets, values = flat(table[column])
        numbers = values.cast(pa.int64()).to_numpy(zero_copy_only=False)
        if column == "seq_lengths":
            totals = np.concatenate([[0], np.cumsum(numbers)])[offsets]
            wrong = np.flatnonzero(np.diff(totals) != lengths)
            text = "'seq_lengths' add up to {0} tokens, 'input_ids' has {1}"
            counts = np.diff(totals)
        else:
            counts = np.diff(offsets)
            wrong = np.flatnonzero(counts != lengths)
            text = f"{column!r} has {{0}} values, 'input_ids' has {{1}}: write one for each token"
        if len(wrong):
            faults.append((int(wrong[0]), text.format(counts[wrong[0]], lengths[wrong[0]])))
        elif column in MASKS and len(outside := np.flatnonzero((numbers != 0) & (numbers != 1))):
            position = int(outside[0])
            faults.append((row_of(offsets, position), f"{column!r} holds {numbers[position]}: write 0 or 1"))
        elif column == "attention_mask" and len(padding := np.flatnonzero(numbers == 0)):
            row = row_of(offsets, int(padding[0]))
            side = "left" if numbers[offsets[row]] == 0 else "right"
            faults.append(
                (
                    row,
                    f"padded on the {side} (attention_mask has zeros): write input_ids without padding, "
                    "batches are padded as they are made",
                )
            )
    return min(faults) if faults else None


def _list_fault(values: Any, column: str) -> tuple[int, str] | None:
    """The first row of a column that is no list of whole numbers."""
    if pa.types.is_null(values.type):
        return 0, f"{column!r} is empty"
    if values.null_count:
        return int(np.argmax(values.is_null().to_numpy(zero_copy_only=False))), f"{column!r} is empty"
    if not is_ragged(values.type):
        return _first_odd(values, column)
    offsets, numbers = flat(values)
    empty = np.flatnonzero(np.diff(offsets) == 0)
    found = [(int(empty[0]), f"{column!r} is empty")] if len(empty) and column != "labels" else []
    if numbers.null_count:
        position = int(np.argmax(numbers.is_null().to_numpy(zero_copy_only=False)))
        found.append((row_of(offsets, position), f"{column!r} holds null"))
    elif pa.types.is_floating(numbers.type) and len(numbers):
        floats = numbers.to_numpy(zero_copy_only=False)
        is_odd = (floats != np.floor(floats)) | ~(np.abs(floats) < 2**53)
        position = int(np.argmax(is_odd))
        value = _number(float(floats[position]))
        row = row_of(offsets, position)
        found.append((row, f"{column!r} holds {value}: write whole numbers, not {numbers.type}"))
    elif pa.types.is_boolean(numbers.type):
        if column not in MASKS:
            found.append((0, f"{column!r} holds truth values: write token ids"))
    elif pa.types.is_null(numbers.type):
        found.append((0, f"{column!r} is empty"))
    elif not pa.types.is_integer(numbers.type):
        odd = _first_odd(values, column)
        found += [] if odd is None else [odd]
    elif pa.types.is_uint64(numbers.type):
        whole = numbers.to_numpy(zero_copy_only=False)
        position = int(np.argmax(whole > np.iinfo(np.int64).max))
        if len(whole) and whole[position] > np.iinfo(np.int64).max:
            found.append(
                (row_of(offsets, position), f"{column!r} holds {whole[position]}: no model has as many")
            )
    return min(found) if found else None


def _first_odd(values: Any, column: str) -> tuple[int, str]:
    """The fault of a column whose values differ in kind, or are no lists."""
    for row, value in enumerate(map(_decoded, values.to_pylist())):
        if not isinstance(value, list):
            return row, f"{column!r} is {_word(value)}, not a list of token ids"
        for element in value:
            if isinstance(element, bool) or not isinstance(element, int):
                return row, f"{column!r} holds {_word(element)} ({_short(element)}), not only token ids"
    return 0, f"{column!r} holds {values.type}, not lists of token ids"


def _decoded(value: Any) -> Any:
    """What `datasets` keeps as a string of JSON, where values of a column differ in kind (datasets 5.2)."""
    if isinstance(value, list):
        return [_decoded(element) for element in value]
    try:
        return json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError:
        return value


def _number(value: float) -> str:
    return str(value) if math.isfinite(value) else {"nan": "NaN"}.get(str(value), str(value))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 20 else f"{text[:17]}..."


def _word(value: Any) -> str:
    return "null" if value is None else _WORDS.get(type(value), type(value).__name__)
