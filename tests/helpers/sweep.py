"""The sweep: each causal LM class, chunked against unchunked, in fp64 (`sweep_table` runs it over all).

What always holds: the unchunked model is the reference; a packed stream runs through it segment by segment.
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from chunkdist import ChunkConfig, UnsupportedModelError, chunk_model, unchunk_model
from chunkdist.chunking import chunk_report
from tests.helpers.model_zoo import (
    AUDIO_CODES,
    FIRST_PLAIN_TOKEN,
    NOT_BUILT,
    VOCAB_SIZE,
    other_layer_types,
    tiny_model,
)

NUM_TOKENS = 37
"""A prime: no other dim of a tiny model is as long by accident."""
CHUNK_SIZE = 7
SEGMENTS = (12, 20, 5)
"""Lengths of a packed stream's segments: none ends where a chunk ends, one covers several chunks."""
TOLERANCE = 1e-9


@dataclass(frozen=True, kw_only=True)
class Record:
    """What came of one class: "exact", "refused", "not built"; and what must not be: "wrong", "crashed"."""

    name: str
    outcome: str
    reason: str = ""


class InDouble(TorchDispatchMode):
    """Models compute norms, rotary embeddings and softmaxes in fp32 whatever their dtype: here, in fp64."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(
            *args, **{key: torch.float64 if x is torch.float32 else x for key, x in (kwargs or {}).items()}
        )


@dataclass(frozen=True, kw_only=True)
class Step:
    """Loss and gradients of one step."""

    loss: float
    grads: dict[str, Tensor]


def run_class(name: str) -> Record:
    """Sweeps one class: its default kinds of layers, and, if these are exact, the others that it knows."""
    if name in NOT_BUILT:
        return Record(name=name, outcome="not built", reason=NOT_BUILT[name])
    try:
        with double_precision(), torch.random.fork_rng():
            torch.manual_seed(0)
            record = _compare(name, tiny_model(name))
            others = other_layer_types(name)
            if record.outcome != "exact" or not others:
                return record
            other_record = _compare(name, tiny_model(name, others))
            if other_record.outcome == "refused":
                return replace(
                    record, reason=f"with its default layers, not with all it knows: {other_record.reason}"
                )
            return other_record
    except Exception as error:
        return Record(name=name, outcome="crashed", reason=describe(error))


def _compare(name: str, model: PreTrainedModel) -> Record:
    rows = _codes() if name in AUDIO_CODES else padded_rows()
    packed = packed_row() if "position_ids" in inspect.signature(model.forward).parameters else None
    cases = [("", rows, 1), ("groups of several layers", rows, "all")]
    cases += [] if packed is None else [("packed streams", packed, 1)]
    notes = ["no packed streams: it takes no position_ids"] if packed is None else []
    references: dict[int, Step] = {}
    for case, inputs, height in cases:
        try:
            step = chunked_step(
                model, inputs, ChunkConfig(chunk_size=CHUNK_SIZE, layers_per_group=height, attention="math")
            )
        except UnsupportedModelError as error:
            if not case:
                return Record(name=name, outcome="refused", reason=str(error))
            notes.append(f"no {case}: {error}")
            continue
        if id(inputs) not in references:
            references[id(inputs)] = plain_step(model, segments(inputs) if inputs is packed else [inputs])
        problem = difference(references[id(inputs)], step)
        if problem is not None:
            return Record(name=name, outcome="wrong", reason=f"{case or 'groups of one layer'}: {problem}")
    insensitive = _insensitive(model)
    if insensitive:
        return Record(name=name, outcome="wrong", reason=insensitive)
    return Record(name=name, outcome="exact", reason="; ".join(notes))


def chunked_step(model: PreTrainedModel, inputs: dict[str, Tensor], config: ChunkConfig) -> Step:
    chunk_model(model, config)
    try:
        step = plain_step(model, [inputs])
        if any(layer.calls_attention for group in model._chunkdist_model.groups for layer in group.layers):
            assert chunk_report(model).attention == "math", "nothing ran in chunks"
            assert chunk_report(model).attention_reason == "as configured", "nothing ran in chunks"
        return step
    finally:
        unchunk_model(model)


def padded_rows() -> dict[str, Tensor]:
    """Two rows, the second one padded on the right."""
    input_ids = torch.randint(FIRST_PLAIN_TOKEN, VOCAB_SIZE, (2, NUM_TOKENS))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, -9:] = 0
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "labels": input_ids.masked_fill(attention_mask == 0, -100),
    }


def packed_row() -> dict[str, Tensor]:
    """One row of several segments."""
    assert sum(SEGMENTS) == NUM_TOKENS
    input_ids = torch.randint(FIRST_PLAIN_TOKEN, VOCAB_SIZE, (1, NUM_TOKENS))
    labels = input_ids.clone()
    labels[0, [sum(SEGMENTS[:index]) for index in range(len(SEGMENTS))]] = -100
    position_ids = torch.cat([torch.arange(length) for length in SEGMENTS])[None]
    return {"input_ids": input_ids, "position_ids": position_ids, "labels": labels}


def _codes() -> dict[str, Tensor]:
    """Audio codes: four rows make one of the model's."""
    input_ids = torch.randint(FIRST_PLAIN_TOKEN, VOCAB_SIZE, (8, NUM_TOKENS))
    return {"input_ids": input_ids, "labels": input_ids.reshape(2, 4, NUM_TOKENS).transpose(1, 2)}


def segments(packed: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    parts = {key: x.split(SEGMENTS, dim=1) for key, x in packed.items()}
    return [{key: x[index] for key, x in parts.items()} for index in range(len(SEGMENTS))]


def plain_step(model: PreTrainedModel, parts: Iterable[dict[str, Tensor]]) -> Step:
    """One step; the loss of several parts is the mean over all of their labels."""
    parts = list(parts)
    counts = [int((part["labels"][:, 1:] != -100).sum()) for part in parts]
    total = 0.0
    for part, count in zip(parts, counts, strict=True):
        loss = model(**part, use_cache=False).loss * (count / sum(counts))
        loss.backward()
        total += loss.item()
    grads = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return Step(loss=total, grads=grads)


def difference(expected: Step, actual: Step) -> str | None:
    """What differs most, if too much. A gradient that is zero but for rounding is measured by the largest."""
    if abs(actual.loss - expected.loss) > TOLERANCE * abs(expected.loss):
        return f"loss {actual.loss} instead of {expected.loss}"
    largest = max(float(grad.norm()) for grad in expected.grads.values())
    errors = {}
    for key in expected.grads.keys() | actual.grads.keys():
        a, b = expected.grads.get(key), actual.grads.get(key)
        present = a if a is not None else b
        assert present is not None
        a, b = (torch.zeros_like(present) if x is None else x for x in (a, b))
        errors[key] = float((a - b).norm() / (a.norm() + 1e-4 * largest))
    worst = max(errors, key=lambda key: errors[key] if errors[key] == errors[key] else float("inf"))
    return None if errors[worst] <= TOLERANCE else f"gradient of {worst} off by {errors[worst]:.1e}"


def _insensitive(model: PreTrainedModel) -> str | None:
    """Says so if an error in the attention would not show: then the comparison proves nothing."""
    input_ids = padded_rows()["input_ids"]
    changed = input_ids.clone()
    changed[:, 0] = FIRST_PLAIN_TOKEN + (changed[:, 0] + 1 - FIRST_PLAIN_TOKEN) % (
        VOCAB_SIZE - FIRST_PLAIN_TOKEN
    )
    with torch.no_grad():
        before, after = (
            model(input_ids=x, use_cache=False).logits[:, CHUNK_SIZE:] for x in (input_ids, changed)
        )
    effect = float((after - before).norm() / before.norm())
    return None if effect > 1e-3 else f"the first token hardly changes the next chunk's logits ({effect:.1e})"


@contextmanager
def double_precision() -> Iterator[None]:
    """Everything in fp64 that can be."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with InDouble():
            yield
    finally:
        torch.set_default_dtype(before)


def describe(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)[-2:]
    where = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(frames))
    return f"{type(error).__name__}: {error} ({where})".replace("\n", " ")
