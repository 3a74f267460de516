"""The documents of a corpus as sequences of a length."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """Sequences of one length, that have no token in common.

    Args:
        rows: (ids, labels) each.
        num_joined: How many of them are of more than one document.
    """

    rows: list[tuple[list[int], list[int]]]
    num_joined: int


def read_documents(
    samples: Iterable[Mapping[str, Any]], *, max_tokens: int
) -> list[tuple[list[int], list[int]]]:
    """Ids and labels of the first samples, until there are `max_tokens` tokens."""
    found, num_tokens = [], 0
    for sample in samples:
        ids = list(sample["input_ids"])
        found.append((ids, list(sample.get("labels") or ids)))
        num_tokens += len(ids)
        if num_tokens >= max_tokens:
            break
    return found


def longest_first(
    documents: Sequence[tuple[list[int], list[int]]], *, num_tokens: int, num_rows: int
) -> Sequences:
    """At most `num_rows` sequences of `num_tokens` tokens, each the beginning of a document, the longest
    documents first. Where they are shorter, as many as it takes are joined.

    Raises:
        ValueError: there are not enough tokens for one sequence.
    """
    rows: list[tuple[list[int], list[int]]] = []
    ids: list[int] = []
    labels: list[int] = []
    num_joined = num_parts = 0
    for document in sorted(documents, key=lambda document: -len(document[0])):
        if len(rows) == num_rows:
            break
        ids, labels, num_parts = [*ids, *document[0]], [*labels, *document[1]], num_parts + 1
        if len(ids) >= num_tokens:
            rows.append((ids[:num_tokens], labels[:num_tokens]))
            num_joined += num_parts > 1
            ids, labels, num_parts = [], [], 0
    if not rows:
        total = sum(len(ids) for ids, _ in documents)
        raise ValueError(
            f"the data has {total:,} tokens, a sequence is to have {num_tokens:,}: write shorter --lengths, "
            "or more data"
        )
    return Sequences(rows=rows, num_joined=num_joined)
