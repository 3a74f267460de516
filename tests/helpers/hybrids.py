"""Models whose layers keep state other than keys and values, and the whole grid of schedules for them.

    python -m tests.helpers.hybrids             # all classes, all schedules: half an hour on one core
    python -m tests.helpers.hybrids NAME...     # some classes

The tests run a part of it, and the sweep every class with chunks of 7.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import lru_cache
from itertools import product
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from chunkdist import ChunkConfig
from tests.helpers.model_zoo import tiny_model
from tests.helpers.sweep import (
    NUM_TOKENS,
    SEGMENTS,
    Step,
    chunked_step,
    double_precision,
    packed_row,
    padded_rows,
    plain_step,
    segments,
)

LAYER_TYPES: dict[str, list[str] | None] = {
    "Qwen3_5ForCausalLM": None,
    "Qwen3_5MoeForCausalLM": None,
    "Qwen3NextForCausalLM": None,
    "KimiLinearForCausalLM": None,
    "NemotronHForCausalLM": None,
    "GraniteMoeHybridForCausalLM": None,
    "OlmoHybridForCausalLM": None,
    "Lfm2ForCausalLM": ["conv", "full_attention"],
    "FalconH1ForCausalLM": None,
    "BambaForCausalLM": None,
}
"""Where the default config has no layer of a kind, what it is given instead."""

CHUNK_SIZES = (1, 5, 16, NUM_TOKENS)
HEIGHTS = (1, 2, "all")
INPUTS = {"rows": padded_rows, "packed": packed_row}


def model_of(name: str) -> PreTrainedModel:
    return tiny_model(name, LAYER_TYPES[name])


_kept = lru_cache(model_of)


@lru_cache
def inputs_of(kind: str) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return INPUTS[kind]()


@lru_cache
def expected(name: str, kind: str) -> Step:
    """The unchunked model; a packed stream runs through it segment by segment."""
    inputs = inputs_of(kind)
    with double_precision():
        return plain_step(_kept(name), segments(inputs) if kind == "packed" else [inputs])


def error_of(name: str, kind: str, **schedule: Any) -> float:
    """The largest relative error of the loss and of all gradients."""
    with double_precision():
        found = chunked_step(_kept(name), inputs_of(kind), ChunkConfig(attention="math", **schedule))
    truth = expected(name, kind)
    assert found.grads.keys() == truth.grads.keys()
    largest = max(float(grad.norm()) for grad in truth.grads.values())
    errors = [
        float((found.grads[key] - grad).norm() / (grad.norm() + 1e-4 * largest))
        for key, grad in truth.grads.items()
    ]
    return max(abs(found.loss - truth.loss) / abs(truth.loss), *errors)


def grid() -> Iterator[tuple[str, dict[str, Any]]]:
    for kind, size, height in product(INPUTS, CHUNK_SIZES, HEIGHTS):
        yield kind, {"chunk_size": size, "layers_per_group": height}
    for kind, height, retained in product(INPUTS, HEIGHTS, (1, 2)):
        yield kind, {"chunk_size": 5, "layers_per_group": height, "retained_chunks": retained}


def main() -> None:
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    print(f"{NUM_TOKENS} tokens, packed: {SEGMENTS}")
    for name in sys.argv[1:] or LAYER_TYPES:
        errors = {str(case): error_of(name, case[0], **case[1]) for case in grid()}
        worst = max(errors, key=lambda case: errors[case])
        print(f"{name}: {len(errors)} schedules, largest error {errors[worst]:.1e} ({worst})", flush=True)


if __name__ == "__main__":
    main()
