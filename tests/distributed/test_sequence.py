"""Ranks that share rows have, together, the gradients of one process: all parameters, fp64."""

from __future__ import annotations

from typing import Any

from tests.distributed.cases import EveryOther
from tests.distributed.ranks import Ranks
from tests.distributed.sequences import (
    INPUTS,
    MODELS,
    NUM_TOKENS,
    SequenceCase,
    planted,
    refusals,
    step_errors,
)

SETTINGS: dict[str, dict[str, Any]] = {
    "group of 2": {"layers_per_group": 2},
    "one group": {"layers_per_group": "all"},
    "K/V kept": {"rebuild_kv": False},
    "K/V rebuilt in a group of 2": {"layers_per_group": 2, "rebuild_kv": True},
    "2 retained": {"retained_chunks": 2},
    "all retained, one group": {"retained_chunks": 99, "layers_per_group": "all"},
    "offload": {"offload": "host"},
    "offload, group of 2, 1 retained": {"offload": "host", "layers_per_group": 2, "retained_chunks": 1},
    "attention kept": {"keep_attention": True},
    "attention on the host, group of 2": {
        "keep_attention": True,
        "offload": "host",
        "layers_per_group": 2,
    },
    "SpaCO": {"sampler": EveryOther()},
    "SpaCO, one group": {"sampler": EveryOther(), "layers_per_group": "all"},
    "SpaCO, control variate": {"sampler": EveryOther(), "control_variate": True},
    "cpu_flash": {"attention": "cpu_flash"},
}
CASES = {
    **{
        f"chunks of {size or 'one a rank'}": SequenceCase(chunk_size=size)
        for size in (0, 16, NUM_TOKENS, 400)
    },
    **{name: SequenceCase(model=name) for name in MODELS},
    **{name: SequenceCase(inputs=name) for name in INPUTS},
    **{name: SequenceCase(settings=settings, inputs="packed") for name, settings in SETTINGS.items()},
    "window, packed, one group": SequenceCase(
        model="window", inputs="packed", settings={"layers_per_group": "all"}
    ),
    "LoRA, retained": SequenceCase(model="LoRA", settings={"retained_chunks": 1, "layers_per_group": 2}),
    "embeddings": SequenceCase(embeds=True),
    "shifted labels": SequenceCase(shifted=True),
}


def check(found: list[dict[str, float]]) -> None:
    for errors in found:
        wrong = {name: error for name, error in errors.items() if not error < 1e-10}
        assert not wrong
        assert errors.keys() == CASES.keys()


def test_two_ranks(two_ranks: Ranks) -> None:
    check(two_ranks.run(step_errors, CASES))


def test_four_ranks(four_ranks: Ranks) -> None:
    check(four_ranks.run(step_errors, CASES))


REFUSED = {
    "lengths": "different numbers of tokens (18, 17): each passes a part of the same rows",
    "arguments": "the ranks of the sequence group passed different arguments",
    "chunk": "chunk_size=9 is not a multiple of the 2 ranks that share each chunk: write chunk_size=8",
    "auto": "chunk_size='auto' with a sequence group, whose ranks might choose differently",
    "heads": "3 query heads and 3 kv heads, and the sequence group 2 ranks",
    "left padding": "left padding, and ranks share the tokens of each row, padding too",
    "labels of padding": "labels of padding (where attention_mask is 0)",
    "state": "layers with state between tokens, which ranks do not hand on to each other",
    "hidden states": "output_hidden_states=True, but under sequence parallelism",
    "bounds": "cu_seq_lens_q was passed to LlamaModel under sequence parallelism",
    "a cache": "use_cache=True was passed while training",
}


def test_refusals(two_ranks: Ranks) -> None:
    """On all ranks, so that nobody waits."""
    for found in two_ranks.run(refusals):
        assert found.keys() == REFUSED.keys()
        assert not {name: said for name, said in found.items() if REFUSED[name] not in said}


def test_a_fault_is_seen(two_ranks: Ranks) -> None:
    for errors in two_ranks.run(planted):
        assert all(error > 1e-4 for error in errors.values())
