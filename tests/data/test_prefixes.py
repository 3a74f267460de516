"""Sequences that share a prefix go where it is computed once, and cost what they add."""

from __future__ import annotations

import random

import pytest
import torch
from datasets import Dataset

from chunkdist.data.assignment import assign_sequences, pack_streams, plan_batch
from chunkdist.data.cost import SequenceCost
from chunkdist.data.long_tail import long_tailed_lengths
from chunkdist.data.prefixes import SamplePrefixes, SharedPrefixes
from chunkdist.data.report import PackingReport
from chunkdist.models.flops import num_pairs
from chunkdist.stream.layout import PrefixRule, SequencePlace, lay_out
from tests.stream.test_layout import CPU, EVERY, random_tree

COST = SequenceCost(per_token=1000.0, per_pair=((None, 1.0),))


def found_in(rows: list[list[int]], rule: PrefixRule = EVERY) -> SharedPrefixes:
    return SharedPrefixes.of({index: torch.tensor(row) for index, row in enumerate(rows)}, rule)


def families(num: int, prompt: int, *completions: int) -> list[list[int]]:
    """Prompts of equal length with completions of these lengths each, mixed."""
    rows = []
    for number, length in enumerate(completions):
        for family in range(num):
            rows.append([1000 * family + token for token in range(prompt)] + [-number - 1] * length)
    return rows


def distinct(rows: list[list[int]]) -> int:
    return len({tuple(row[: end + 1]) for row in rows for end in range(len(row))})


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("rule", [EVERY, PrefixRule(least=3)], ids=str)
def test_what_a_stream_adds_up_to_is_what_its_layout_computes(seed: int, rule: PrefixRule) -> None:
    rng = random.Random(seed)
    rows = [row for row in random_tree(rng) if row]
    prefixes, order = found_in(rows, rule), list(range(len(rows)))
    rng.shuffle(order)
    some = order[: rng.randint(1, len(order))]
    shared = prefixes.in_one(some)
    shape = len(some), max(len(rows[index]) for index in some)
    places = [SequencePlace(row, 0, len(rows[index])) for row, index in enumerate(some)]
    keys = [torch.tensor(rows[index])[:, None] for index in some]
    layout = lay_out(shape, places, CPU, keys=keys, rule=rule)
    assert sum(len(rows[index]) for index in some) - sum(shared) == layout.num_tokens
    for place, index in enumerate(some):
        own = [rows[other] for other in some[:place]]
        equal = [
            next((i for i, (a, b) in enumerate(zip(rows[index], other, strict=False)) if a != b), None)
            for other in own
        ]
        lengths = [
            min(len(rows[index]), len(other)) if num is None else num
            for other, num in zip(own, equal, strict=True)
        ]
        assert shared[place] == max([num for num in lengths if num >= rule.least], default=0)


def test_a_suffix_costs_what_it_adds() -> None:
    windowed = SequenceCost(per_token=2.0, per_pair=((None, 1.0), (4, 3.0)))
    expected = 2.0 * 7 + (num_pairs(12) - num_pairs(5)) + 3 * (num_pairs(12, 4) - num_pairs(5, 4))
    assert windowed(12, 5) == expected
    assert windowed(12, 5) + windowed(5) == windowed(12)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_families_stay_together_on_ranks_of_equal_cost(num_ranks: int) -> None:
    rows = families(8, 200, 20, 30, 25, 20)
    prefixes = found_in(rows)
    plan = plan_batch(
        [len(row) for row in rows], num_ranks=num_ranks, cost=COST, budget_tokens=4000, chunk_size=64,
        prefixes=prefixes,
    )  # fmt: skip
    report = PackingReport.of([plan], [len(row) for row in rows], cost=COST, chunk_size=64)
    assert sum(map(sum, report.tokens)) == distinct(rows) == 8 * (200 + 95)
    assert report.imbalance < 1.01
    expected = sum(COST(200) + sum(COST(200 + n, 200) for n in (20, 30, 25, 20)) for _ in range(8))
    assert sum(map(sum, report.costs)) == pytest.approx(expected)
    assert sorted(i for streams in plan.streams for s in streams for i in s) == list(range(len(rows)))


def test_a_family_that_is_too_costly_for_one_rank_is_spread() -> None:
    rows = families(1, 100, *[90] * 16)
    lengths = [len(row) for row in rows]
    bins = assign_sequences(lengths, num_bins=4, cost=COST, prefixes=found_in(rows))
    assert sorted(map(len, bins)) == [4, 4, 4, 4]


def test_streams_hold_a_prefix_once_in_their_budget() -> None:
    rows = families(2, 50, *[10] * 9)
    lengths, prefixes = [len(row) for row in rows], found_in(rows)
    streams = pack_streams(lengths, budget_tokens=100, chunk_size=16, prefixes=prefixes)
    sizes = [sum(lengths[i] for i in stream) - sum(prefixes.in_one(stream)) for stream in streams]
    assert max(sizes) <= 100
    assert all(len({i % 2 for i in stream}) == 1 for stream in streams), "one family each"
    assert len(streams) == 4
    assert len(pack_streams(lengths, budget_tokens=100, chunk_size=16)) == 18


@pytest.mark.parametrize("num_ranks", [1, 8])
def test_without_common_beginnings_nothing_changes(num_ranks: int) -> None:
    lengths = long_tailed_lengths(64, divisor=64)
    rows = {index: torch.full((length,), index) for index, length in enumerate(lengths)}
    settings = {"num_ranks": num_ranks, "cost": COST, "budget_tokens": 2048, "chunk_size": 64}
    prefixes = SharedPrefixes.of(rows, EVERY)
    assert prefixes.paths == {}
    with_them = plan_batch(lengths, **settings, prefixes=prefixes)  # type: ignore[arg-type]
    assert with_them == plan_batch(lengths, **settings)  # type: ignore[arg-type]


def test_of_samples() -> None:
    rows = [[9, 9, 9], *families(2, 6, 3, 1, 2), [0, 1, 2]]
    samples = Dataset.from_list([{"input_ids": row, "labels": row} for row in rows])
    find = SamplePrefixes(samples, PrefixRule(least=4))
    assert find([0, 1, 2, 7]).paths == {}
    assert find([0, 1, 3, 4, 2]).in_one(range(5)) == (0, 0, 6, 0, 6)
    assert SamplePrefixes(samples, EVERY)([1, 7]).in_one([0, 1]) == (0, 3)
    assert SamplePrefixes(samples, PrefixRule(multiple=4))([1, 3]).in_one([0, 1]) == (0, 4)
