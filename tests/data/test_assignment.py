"""Sequences to ranks and streams: each once, balanced, in their budgets, the same on every rank."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from chunkdist.data.assignment import BatchPlan, assign_sequences, pack_streams, plan_batch
from chunkdist.data.cost import SequenceCost
from chunkdist.data.long_tail import LONGEST, long_tailed_lengths
from chunkdist.data.report import PackingReport
from chunkdist.data.sampler import StreamBatchSampler
from chunkdist.data.streams import join_sequences
from chunkdist.models.flops import StepFlops
from tests.helpers.models import tiny_llama

LLAMA_3_8B = SequenceCost(per_token=6 * 7.5e9, per_pair=((None, 12 * 4096 * 32),))
CHUNK_SIZE = 1024


class TestLongTail:
    def test_is_the_sample_of_the_claims(self) -> None:
        lengths = long_tailed_lengths(100_000)
        assert lengths == long_tailed_lengths(100_000)
        assert 0.975 < sum(length < 4096 for length in lengths) / len(lengths) < 0.985
        assert max(lengths) == LONGEST
        assert min(lengths) >= 1
        assert lengths != long_tailed_lengths(100_000, seed=1)

    def test_scaled_down(self) -> None:
        lengths = long_tailed_lengths(100_000, divisor=64)
        assert max(lengths) == LONGEST // 64
        assert sum(length < 64 for length in lengths) / len(lengths) == pytest.approx(0.98, abs=0.005)


class TestCost:
    def test_of_a_model_is_its_flops(self) -> None:
        model = tiny_llama()
        cost, flops = SequenceCost.of(model), StepFlops.of(model)
        for length in (1, 7, 500):
            assert cost(length) == flops.step([length])

    def test_of_a_config_needs_no_weights(self) -> None:
        model = tiny_llama()
        assert isinstance(model.config, LlamaConfig)
        assert SequenceCost.of_config(model.config) == SequenceCost.of(model)

    def test_measured(self) -> None:
        truth = SequenceCost(per_token=2e-3, per_pair=((None, 3e-6),))
        lengths = [100, 1000, 10_000]
        found = SequenceCost.measured(lengths, [truth(length) for length in lengths])
        assert found(5000) == pytest.approx(truth(5000))

    def test_measured_costs_are_not_negative(self) -> None:
        found = SequenceCost.measured([100, 1000], [1.0, 9.0])  # less than linear
        assert found.per_token > 0
        assert found.per_pair == ((None, 0.0),)

    @pytest.mark.parametrize(("lengths", "seconds"), [([5, 5], [1.0, 1.0]), ([5, 6], [1.0, 0.0])])
    def test_too_little_measured(self, lengths: list[int], seconds: list[float]) -> None:
        with pytest.raises(ValueError, match="two different lengths"):
            SequenceCost.measured(lengths, seconds)


class TestAssignment:
    @pytest.mark.parametrize("chunk_size", [None, CHUNK_SIZE])
    def test_each_sequence_once_and_deterministic(self, chunk_size: int | None) -> None:
        lengths = long_tailed_lengths(256)
        bins = assign_sequences(lengths, num_bins=8, cost=LLAMA_3_8B, chunk_size=chunk_size)
        assert sorted(index for indices in bins for index in indices) == list(range(len(lengths)))
        assert bins == assign_sequences(lengths, num_bins=8, cost=LLAMA_3_8B, chunk_size=chunk_size)

    def test_fewer_sequences_than_bins(self) -> None:
        assert sorted(assign_sequences([5, 7], num_bins=3, cost=LLAMA_3_8B)) == [[], [0], [1]]
        assert assign_sequences([], num_bins=2, cost=LLAMA_3_8B) == [[], []]

    def test_cost_counts_not_tokens(self) -> None:
        quadratic = SequenceCost(per_token=0.0, per_pair=((None, 1.0),))
        assert assign_sequences([100, 50, 50, 50, 50], num_bins=2, cost=quadratic) == [[0], [1, 2, 3, 4]]

    def test_many_in_less_than_a_second(self) -> None:
        lengths = long_tailed_lengths(4096)
        for chunk_size in (None, CHUNK_SIZE):
            start = time.process_time()
            assign_sequences(lengths, num_bins=512, cost=LLAMA_3_8B, chunk_size=chunk_size)
            assert time.process_time() - start < 1

    @pytest.mark.parametrize(("lengths", "num_bins"), [([3], 0), ([3, 0], 2)])
    def test_bad_input(self, lengths: list[int], num_bins: int) -> None:
        with pytest.raises(ValueError, match=r"write at least 1|has 0 tokens"):
            assign_sequences(lengths, num_bins=num_bins, cost=LLAMA_3_8B)


@pytest.mark.parametrize("chunk_size", [1024, 1536])
@pytest.mark.parametrize(
    ("num_ranks", "batch_sequences", "longest", "num_even"),
    [(8, 256, LONGEST, 16), (64, 256, LONGEST, 0), (64, 2048, 8192, 5)],
)
def test_long_tailed_batches_are_balanced_and_full(
    num_ranks: int, batch_sequences: int, longest: int, num_even: int, chunk_size: int
) -> None:
    """No rank costs more than 1.05 times the least that an assignment can reach: the mean, or the costliest
    sequence. On 64 ranks, batches in which it is the mean need more sequences, none of them very long.
    docs/data.md has the figures of all of the sample."""
    kept = [length for length in long_tailed_lengths(100_000) if length <= longest]
    found_even = tokens = slots = 0
    for number in range(40 if batch_sequences == 256 else 5):
        lengths = kept[number * batch_sequences : (number + 1) * batch_sequences]
        plan = plan_batch(
            lengths, num_ranks=num_ranks, cost=LLAMA_3_8B, budget_tokens=LONGEST, chunk_size=chunk_size
        )
        report = PackingReport.of([plan], lengths, cost=LLAMA_3_8B, chunk_size=chunk_size)
        mean = sum(map(LLAMA_3_8B, lengths)) / num_ranks
        least = max(1.0, max(map(LLAMA_3_8B, lengths)) / mean)
        assert report.imbalance <= 1.05 * least + 1e-9
        found_even += least == 1
        totals = [sum(lengths[index] for index in stream) for streams in plan.streams for stream in streams]
        assert sum(totals) == sum(lengths)
        tokens, slots = tokens + sum(totals), slots + sum(-(-n // chunk_size) * chunk_size for n in totals)
    assert found_even == num_even
    assert 1 - tokens / slots < 0.01


class TestStreams:
    def test_budget_unless_one_alone_is_longer(self) -> None:
        lengths = [500, 90, 60, 40, 40, 30, 10, 1]
        streams = pack_streams(lengths, budget_tokens=100, chunk_size=16)
        assert sorted(index for stream in streams for index in stream) == list(range(len(lengths)))
        assert [0] in streams
        assert all(sum(lengths[i] for i in stream) <= 100 for stream in streams if stream != [0])

    def test_at_least_so_many(self) -> None:
        streams = pack_streams([10] * 8, budget_tokens=1000, chunk_size=4, num_streams=4)
        assert [len(stream) for stream in streams] == [2, 2, 2, 2]
        assert pack_streams([10], budget_tokens=1000, chunk_size=4, num_streams=3) == [[0], [], []]

    @pytest.mark.parametrize("name", ["budget_tokens", "chunk_size", "num_streams"])
    def test_bad_input(self, name: str) -> None:
        with pytest.raises(ValueError, match=f"{name}=0"):
            pack_streams([3], **{"budget_tokens": 8, "chunk_size": 4, name: 0})

    def test_all_ranks_have_as_many_micro_batches(self) -> None:
        plan = plan_batch([1000, 90, 80, 70], num_ranks=2, cost=LLAMA_3_8B, budget_tokens=100, chunk_size=16)
        assert plan.streams == (((0,), (), ()), ((1,), (2,), (3,)))
        assert plan.num_micro_batches == 3


class TestReport:
    def test_by_hand(self) -> None:
        plan = plan_batch(
            [8, 3, 2, 2], num_ranks=2, cost=SequenceCost(per_token=1.0), budget_tokens=8, chunk_size=4
        )
        report = PackingReport.of(
            [plan, plan], [8, 3, 2, 2], cost=SequenceCost(per_token=1.0), chunk_size=4, retained_chunks=1
        )
        assert report.tokens == ((8, 8), (7, 7))
        assert report.imbalance == pytest.approx(8 / 7.5)
        # 8: two chunks, the first run again. 3 + 2 + 2: the second sequence is in both chunks
        assert report.recomputed_share == pytest.approx((4 + 4) / 15)
        assert report.empty_share == pytest.approx(1 / 16)

    def test_imbalances_of_steps_do_not_cancel(self) -> None:
        """Rank 0 is the heavier one in the first step, rank 1 in the second."""
        plans = [BatchPlan(streams=streams) for streams in ((((0,),), ((1,),)), (((1,),), ((0,),)))]
        report = PackingReport.of(plans, [9, 3], cost=SequenceCost(per_token=1.0), chunk_size=4)
        assert report.imbalance == pytest.approx(9 / 6)


class TestSampler:
    @staticmethod
    def samplers(num_ranks: int, **values: Any) -> list[StreamBatchSampler]:
        settings: dict[str, Any] = {
            "batch_sequences": 10, "cost": LLAMA_3_8B, "budget_tokens": 64, "chunk_size": 8,
            "num_slots": 2, "seed": 3, **values,
        }  # fmt: skip
        lengths = long_tailed_lengths(37, divisor=8)
        return [
            StreamBatchSampler(lengths, num_ranks=num_ranks, rank=rank, **settings)
            for rank in range(num_ranks)
        ]

    def test_an_epoch_has_every_sequence_once_on_one_rank(self) -> None:
        items = [list(sampler) for sampler in self.samplers(3)]
        assert {len(own) for own in items} == {len(self.samplers(3)[0])} == {8}
        for number in range(8):
            assert len({len(own[number]) for own in items}) == 1, "as many streams on all ranks"
        found = [index for own in items for item in own for stream in item for index in stream]
        assert sorted(found) == list(range(37))

    def test_epochs_differ_and_repeat(self) -> None:
        (one,), (other,) = self.samplers(1), self.samplers(1)
        first = list(one)
        one.set_epoch(1)
        assert list(one) != first
        other.set_epoch(1)
        assert list(other) == list(one)
        one.set_epoch(0)
        assert list(one) == first

    def test_without_shuffling_batches_are_in_order(self) -> None:
        (sampler,) = self.samplers(1, shuffle=False)
        first = [index for item in list(sampler)[:2] for stream in item for index in stream]
        assert sorted(first) == list(range(10))

    def test_the_order_is_that_of_torch(self) -> None:
        (sampler,) = self.samplers(1)
        order = torch.randperm(37, generator=torch.Generator().manual_seed(3)).tolist()
        assert sorted(i for stream in sampler.plan(0, 0).streams[0] for i in stream) == sorted(order[:10])


def test_sequences_of_several_dims_are_no_stream() -> None:
    with pytest.raises(ValueError, match=r"tokens \(1, 4\) and labels \(1, 4\): .* in one dim"):
        join_sequences([{"input_ids": torch.arange(4)[None]}])
