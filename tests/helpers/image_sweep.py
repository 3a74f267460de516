"""The sweep of image-text classes: rows with images, chunked against unchunked, in fp64, towers trained."""

from __future__ import annotations

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedModel

from chunkdist import ChunkConfig, UnsupportedModelError, chunk_model, unchunk_model
from tests.helpers.image_zoo import image_rows, tiny_image_model
from tests.helpers.sweep import (
    CHUNK_SIZE,
    Record,
    chunked_step,
    describe,
    difference,
    double_precision,
    plain_step,
)

_NO_MODEL = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
"""What comes of sizes that do not fit together."""


def run_image_class(name: str) -> Record:
    """Sweeps one class; "not built" where the sweep finds no tiny model of it, or no images for that."""
    if getattr(transformers, name).config_class().is_encoder_decoder:
        return Record(name=name, outcome="refused", reason="an encoder-decoder")
    with double_precision(), torch.random.fork_rng():
        torch.manual_seed(0)
        try:
            model = tiny_image_model(name)
        except (ImportError, StrictDataclassError, *_NO_MODEL):
            return Record(name=name, outcome="not built", reason="its default config makes no tiny model")
        try:
            unchunk_model(chunk_model(model, ChunkConfig(chunk_size=CHUNK_SIZE)))
        except UnsupportedModelError as error:
            return Record(name=name, outcome="refused", reason=str(error))
        try:
            return _compare(name, model)
        except Exception as error:
            return Record(name=name, outcome="crashed", reason=describe(error))


def _compare(name: str, model: PreTrainedModel) -> Record:
    try:
        rows = image_rows(model)
        expected = plain_step(model, [rows])
    except _NO_MODEL:
        return Record(name=name, outcome="not built", reason="the sweep makes no images for it")
    notes = []
    for height in (1, "all"):
        config = ChunkConfig(chunk_size=CHUNK_SIZE, layers_per_group=height, attention="math")
        try:
            found = chunked_step(model, rows, config)
        except UnsupportedModelError as error:
            if height == 1:
                return Record(name=name, outcome="refused", reason=str(error))
            notes.append(f"no groups of several layers: {error}")
            continue
        if problem := difference(expected, found):
            return Record(name=name, outcome="wrong", reason=f"layers_per_group={height}: {problem}")
    without = plain_step(model, [{**rows, "pixel_values": -rows["pixel_values"]}])
    if abs(without.loss - expected.loss) < 1e-6 * abs(expected.loss):
        return Record(name=name, outcome="wrong", reason="its loss does not depend on its images")
    return Record(name=name, outcome="exact", reason="; ".join(notes))
