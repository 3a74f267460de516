"""Ranks that share rows have, together, the gradients of one process: all parameters, fp64."""

from __future__ import annotations

from typing import Any

from tests.distributed.cases import CHUNK_SIZE, Case, EngineName, Errors, EveryOther
from tests.distributed.ranks import Ranks
from tests.distributed.sequences import (
    INPUTS,
    MODELS,
    NUM_TOKENS,
    SequenceCase,
    engine_errors,
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


FP32: tuple[EngineName, ...] = ("zero1", "zero2", "zero3")
FP64: tuple[EngineName, ...] = ("ddp", "fsdp2", "fsdp2 groups", "fsdp2 head")


def engine_cases(lengths: tuple[int, ...]) -> dict[str, Case]:
    cases = {}
    for engine in (*FP64, *FP32):
        height: Any = 2 if engine == "fsdp2 groups" else 1
        cases[engine] = Case(engine=engine, lengths=lengths, sequence_ranks=2, layers_per_group=height)
        cases[f"{engine}, LoRA"] = Case(
            engine=engine, lengths=lengths, sequence_ranks=2, lora=True, layers_per_group=height,
            num_micro_batches=2, retained_chunks=1,
        )  # fmt: skip
    return cases


def check_engines(found: list[dict[str, Errors]]) -> None:
    for by_name in found:
        for name, errors in by_name.items():
            bound = 1e-5 if name.startswith(FP32) else 1e-10
            assert max(errors.gradients, errors.updates) < bound, name
            assert errors.loss < 1e-6, name  # computed in fp32


def test_engines(two_ranks: Ranks) -> None:
    check_engines(two_ranks.run(engine_errors, engine_cases((CHUNK_SIZE * 5 + 2,))))


def test_engines_with_data_parallel_groups(four_ranks: Ranks) -> None:
    check_engines(four_ranks.run(engine_errors, engine_cases((CHUNK_SIZE * 5 + 2, CHUNK_SIZE))))


REFUSED = {
    "lengths": "different numbers of tokens (18, 17): each passes a part of the same rows",
    "arguments": "the ranks of the sequence group passed different arguments",
    "chunk": "chunk_size=9 is not a multiple of the 2 ranks that share each chunk: write chunk_size=8",
    "auto": "chunk_size='auto' with a sequence group, whose ranks might choose differently",
    "heads": "3 query heads and 3 kv heads, and the sequence group 2 ranks",
    "forest": "share_prefixes=True, but ranks share the tokens of each row as they were passed",
    "labels of padding": "labels of padding (where attention_mask is 0)",
    "state": "layers with state between tokens, which ranks do not hand on to each other",
    "positions of its own": "RobertaModel has no rotary embedding, and numbers its positions itself",
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
