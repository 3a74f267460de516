"""SpaCO: unbiased by enumeration of every subset of chunks, and what it costs."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from chunkdist import (
    ChunkConfig,
    FixedBudgetSampler,
    ImportanceSampler,
    IndependentSampler,
    RunSampler,
    chunk_model,
)
from chunkdist.chunking import chunk_report
from chunkdist.engine import kv_rebuild
from chunkdist.engine.group import GroupCall
from chunkdist.engine.kv_rebuild import rebuild_parts
from chunkdist.replay import RngState
from chunkdist.stores.kv_store import KVStore
from chunkdist.stream.stream import Stream, cut
from tests.helpers.models import (
    batch,
    gradients,
    largest_difference,
    norms_in_fp64,
    packed_batch,
    tiny_llama,
    with_lora,
)

NUM_CHUNKS, CHUNK_SIZE = 5, 4
INPUTS: dict[str, Callable[[], dict[str, Tensor]]] = {
    "one segment": lambda: batch(num_tokens=NUM_CHUNKS * CHUNK_SIZE - 1),
    "packed": lambda: packed_batch([7, 1, 6, 5]),
}


class Fixed:
    """Draws what it was told, and remembers the scores."""

    unbiased = True

    def __init__(self) -> None:
        self.weights: Tensor | None = None
        self.scores = torch.zeros(0)

    def draw(self, scores: Tensor) -> Tensor:
        self.scores = scores
        return torch.ones_like(scores) if self.weights is None else self.weights


def subsets_with_probability(probabilities: Tensor) -> Iterator[tuple[Tensor, float]]:
    """All weights that independent draws give, and their probabilities."""
    for kept in itertools.product((False, True), repeat=NUM_CHUNKS):
        mask = torch.tensor(kept)
        yield (
            torch.where(mask, 1 / probabilities, 0),
            float(torch.where(mask, probabilities, 1 - probabilities).prod()),
        )


def flat(grads: dict[str, Tensor]) -> Tensor:
    return torch.cat([g.flatten() for name, g in grads.items() if name != "loss"])


def make_model(sampler: Any, height: Any, **settings: Any) -> nn.Module:
    config = ChunkConfig(chunk_size=CHUNK_SIZE, layers_per_group=height, sampler=sampler, **settings)
    return chunk_model(norms_in_fp64(tiny_llama(num_layers=2, hidden_size=16, intermediate_size=16)), config)


def mean_and_error(
    height: Any, inputs: str, weighted: Iterator[tuple[Tensor, float]], **settings: Any
) -> tuple[float, float]:
    """Bias and rms error of the estimated gradient of all parameters, relative to the exact gradient's
    norm."""
    sampler = Fixed()
    model = make_model(sampler, height, **settings)
    exact = flat(gradients(model, INPUTS[inputs]()))
    mean, square = torch.zeros_like(exact), 0.0
    for weights, probability in weighted:
        sampler.weights = weights
        estimate = flat(gradients(model, INPUTS[inputs]()))
        mean += probability * estimate
        square += probability * float((estimate - exact).norm() ** 2)
    return float((mean - exact).norm() / exact.norm()), square**0.5 / float(exact.norm())


@lru_cache
def scores(inputs: str) -> Tensor:
    sampler = Fixed()
    gradients(make_model(sampler, 1), INPUTS[inputs]())
    return sampler.scores


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize(("height", "control_variate"), [(1, True), (1, False), (2, False), ("all", "auto")])
@pytest.mark.parametrize(
    "sampler", [IndependentSampler(budget=2), ImportanceSampler(budget=2, min_probability=0.2)]
)
def test_unbiased_over_all_subsets(sampler: Any, height: Any, control_variate: Any, inputs: str) -> None:
    if isinstance(sampler, ImportanceSampler):
        probabilities = sampler.probabilities(scores(inputs))
    else:
        probabilities = torch.full((NUM_CHUNKS,), 2 / NUM_CHUNKS, dtype=torch.float64)
    bias, error = mean_and_error(
        height, inputs, subsets_with_probability(probabilities), control_variate=control_variate
    )
    assert bias < 1e-7
    assert error > 0.1, "the estimates differ, so the test can see a bias"


def chains_with_probability(sampler: RunSampler, p: list[float]) -> Iterator[tuple[Tensor, float]]:
    """All weights that a chain of chunks gives, and their probabilities."""
    ties = sampler.ties(p)
    for kept in itertools.product((False, True), repeat=NUM_CHUNKS):
        probability = 1.0
        for i in reversed(range(NUM_CHUNKS)):
            is_last = i == NUM_CHUNKS - 1
            chance = p[i] if is_last else sampler.probability_after(kept[i + 1], i, p, ties)
            probability *= chance if kept[i] else 1 - chance
        yield sampler.weights(kept, p, ties), probability


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize(("height", "control_variate"), [(1, True), (1, False), (2, "auto"), ("all", "auto")])
def test_runs_are_unbiased_over_all_subsets(height: Any, control_variate: Any, inputs: str) -> None:
    importance = inputs == "packed"
    sampler = RunSampler(budget=2, run_length=2, importance=importance, min_probability=0.2)
    p = sampler.probabilities(scores(inputs)).tolist()
    bias, error = mean_and_error(
        height, inputs, chains_with_probability(sampler, p), control_variate=control_variate
    )
    assert bias < 1e-7
    assert error > 0.1


@pytest.mark.parametrize("reader", [1, NUM_CHUNKS - 1])
def test_a_changed_relay_is_seen(reader: int) -> None:
    sampler = RunSampler(budget=2)
    p = sampler.probabilities(scores("one segment")).tolist()

    def weighted() -> Iterator[tuple[Tensor, float]]:
        for weights, probability in chains_with_probability(sampler, p):
            weights[reader, reader - 1] *= 1.01
            yield weights, probability

    assert mean_and_error(2, "one segment", weighted())[0] > 1e-5


def test_runs_of_neighbours() -> None:
    torch.manual_seed(0)
    sampler, scores = RunSampler(budget=16, run_length=4), torch.ones(128)
    kept = torch.stack([sampler.draw(scores).diagonal() > 0 for _ in range(200)])
    assert float(kept.double().mean()) == pytest.approx(16 / 128, rel=0.1)
    starts = kept[:, :1].sum() + (kept[:, 1:] & ~kept[:, :-1]).sum()
    assert float(kept.sum() / starts) == pytest.approx(4, rel=0.1)
    weights = sampler.draw(scores)
    assert set(weights.diagonal().unique().tolist()) <= {0.0, 8.0}
    neighbours = weights.diagonal(-1)
    assert torch.allclose(neighbours[neighbours > 0], torch.tensor(4 / 3, dtype=torch.float64))
    assert not weights.triu(1).any()


def test_runs_of_one_are_independent() -> None:
    weights = RunSampler(budget=2, run_length=1).weights([True] * 6, [1 / 3] * 6, [0.0] * 5)
    torch.testing.assert_close(weights, torch.full((6, 6), 3.0, dtype=torch.float64).tril())


@pytest.mark.parametrize("index", range(NUM_CHUNKS))
def test_a_changed_weight_is_seen(index: int) -> None:
    probabilities = torch.full((NUM_CHUNKS,), 1 / 3, dtype=torch.float64)

    def weighted() -> Iterator[tuple[Tensor, float]]:
        for weights, probability in subsets_with_probability(probabilities):
            weights[index] *= 1.01
            yield weights, probability

    assert mean_and_error(1, "one segment", weighted())[0] > 1e-4


def test_the_control_variate_lowers_the_error() -> None:
    probabilities = torch.full((NUM_CHUNKS,), 1 / 3, dtype=torch.float64)
    errors = [
        mean_and_error(1, "one segment", subsets_with_probability(probabilities), control_variate=on)[1]
        for on in (True, False)
    ]
    assert errors[0] < 0.92 * errors[1], "0.94, when kept chunks are projected with those behind them"


def test_the_papers_estimator_is_biased_and_its_bias_falls_to_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    num_chunks, biases = 6, []
    monkeypatch.setitem(INPUTS, "six chunks", lambda: batch(num_tokens=num_chunks * CHUNK_SIZE - 1))
    for budget in range(2, num_chunks + 1):
        subsets = list(itertools.combinations(range(num_chunks), budget))

        def weighted(budget: int = budget, subsets: Any = subsets) -> Iterator[tuple[Tensor, float]]:
            for kept in subsets:
                weights = torch.zeros(num_chunks, dtype=torch.float64)
                weights[list(kept)] = num_chunks / budget
                yield weights, 1 / len(subsets)

        biases.append(mean_and_error(1, "six chunks", weighted(), control_variate=False)[0])
    assert 0.1 < biases[0] < 1
    assert biases == sorted(biases, reverse=True)
    assert biases[-1] < 1e-12


@pytest.mark.parametrize("height", [1, 2])
@pytest.mark.parametrize(
    "sampler",
    [s(budget=NUM_CHUNKS) for s in (IndependentSampler, ImportanceSampler, RunSampler, FixedBudgetSampler)],
)
def test_a_budget_of_all_chunks_is_exact(sampler: Any, height: Any) -> None:
    exact = gradients(make_model(None, height), batch(num_tokens=NUM_CHUNKS * CHUNK_SIZE))
    found = gradients(make_model(sampler, height), batch(num_tokens=NUM_CHUNKS * CHUNK_SIZE))
    assert all(torch.equal(found[name], exact[name]) for name in exact)


def test_frequencies_and_weights_of_the_samplers() -> None:
    torch.manual_seed(0)
    some = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 90.0], dtype=torch.float64)
    importance = ImportanceSampler(budget=3, min_probability=0.1)
    probabilities = importance.probabilities(some)
    assert float(probabilities.sum()) == pytest.approx(3, rel=1e-9)
    assert probabilities[0] == 0.1
    assert probabilities[-1] == 1
    draws = torch.stack([importance.draw(some) for _ in range(1500)])
    torch.testing.assert_close((draws > 0).double().mean(0), probabilities, rtol=0, atol=0.05)
    torch.testing.assert_close(draws.mean(0), torch.ones(6, dtype=torch.float64), rtol=0, atol=0.25)
    draws = torch.stack([IndependentSampler(budget=2).draw(some) for _ in range(1500)])
    assert set(draws.unique().tolist()) == {0.0, 3.0}
    torch.testing.assert_close(
        (draws > 0).double().mean(0), torch.full((6,), 1 / 3).double(), rtol=0, atol=0.05
    )
    draws = torch.stack([FixedBudgetSampler(budget=2, cap=2).draw(some) for _ in range(100)])
    assert (draws > 0).sum(1).unique().tolist() == [2]
    assert draws.max() == 2
    draws = torch.stack([RunSampler(budget=3, importance=True).draw(some) for _ in range(1500)])
    assert draws.shape[1:] == (6, 6)
    kept = draws.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(
        (kept > 0).double().mean(0), ImportanceSampler(budget=3).probabilities(some), rtol=0, atol=0.05
    )
    assert importance.probabilities(torch.zeros(6)).tolist() == [0.5] * 6
    assert importance.probabilities(torch.tensor([float("nan")] * 6)).tolist() == [0.5] * 6


def test_importance_spends_its_budget() -> None:
    """At small budgets too, where few chunks have a loss, and whatever the scale of the scores."""
    rising = torch.arange(1, 65, dtype=torch.float64)
    for scores in (rising, rising * 1e-300, rising * 1e300, rising**40):
        for budget in (1.5, 2, 8, 40):
            p = ImportanceSampler(budget).probabilities(scores)
            assert float(p.sum()) == pytest.approx(budget)
            assert float(p.min()) >= min(0.05, 0.25 * budget / 64)
    assert float(p[-1] / p[0]) > 3
    p = ImportanceSampler(2).probabilities(rising)
    assert float(p[-1] / p[0]) > 3, "not the same for all, at a budget of 1/32"
    few = torch.zeros(64)
    few[-4:] = 1
    p = ImportanceSampler(8).probabilities(few)
    assert p.dtype == torch.float64, "weights are 1 / p to the last bit"
    assert float(ImportanceSampler(4).probabilities(torch.tensor([1, *[5e-324] * 7]).double()).sum()) > 3.9
    assert p[-4:].tolist() == [1] * 4
    assert p[:-4].tolist() == pytest.approx([4 / 60] * 60)


@pytest.mark.parametrize("between_sampled", [True, False])
def test_chunks_that_are_only_projected_go_together(between_sampled: bool) -> None:
    stream = Stream(num_tokens=24, chunks=cut(24, 4), segment_starts=((0,),))
    same = [RngState(torch.zeros(2), [], [], "cpu")] * 6
    drawn = [RngState(torch.full((2,), i), [], [], "cpu") for i in range(6)]
    find = functools.partial(rebuild_parts, stream, range(6), between_sampled=between_sampled)
    halves = [range(2), range(2, 4)] if between_sampled else [range(4)]
    assert find([2, 4], same) == halves
    assert find([2, 4], drawn) == [range(i, i + 1) for i in range(4)]
    long = Stream(num_tokens=4096, chunks=cut(4096, 512), segment_starts=((0,),))
    parts = rebuild_parts(long, range(8), [7], [same[0]] * 8, between_sampled=between_sampled)
    assert parts == [range(2), range(2, 4), range(4, 6), range(6, 7)]


@pytest.mark.parametrize("control_variate", [True, False])
def test_dropout_before_the_attention_is_the_forwards(
    control_variate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Projected together or one by one, chunks get the random numbers of the forward."""

    def found() -> dict[str, Tensor]:
        sampler = Fixed()
        sampler.weights = torch.tensor([0.0, 0, 3, 0, 3, 0])
        config = ChunkConfig(chunk_size=CHUNK_SIZE, sampler=sampler, control_variate=control_variate)
        model = chunk_model(with_lora(tiny_llama(), lora_dropout=0.5), config)
        torch.manual_seed(0)
        return gradients(model, batch(num_tokens=24))

    together = found()
    monkeypatch.setattr(kv_rebuild, "_MAX_TOKENS", 0)
    assert largest_difference(together, found()) < 1e-12


def test_a_sample_of_all_chunks_has_the_bits_of_the_exact_step() -> None:
    """Also where the bits of a product depend on the number of its rows."""

    def found(sampler: Any) -> dict[str, Tensor]:
        model = tiny_llama(num_layers=2, hidden_size=320, dtype=torch.float32, initializer_range=0.05)
        chunk_model(model, ChunkConfig(chunk_size=3, sampler=sampler))
        return gradients(model, batch(num_tokens=24))

    exact, sampled = found(None), found(IndependentSampler(budget=1000))
    assert all(torch.equal(sampled[name], exact[name]) for name in exact)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FixedBudgetSampler(budget=float("inf")), "budget=inf is no number"),  # type: ignore[arg-type]
        (lambda: IndependentSampler(budget=0), "budget=0 is less than one chunk"),
        (lambda: ImportanceSampler(min_probability=0), "min_probability=0"),
        (lambda: FixedBudgetSampler(budget=2.5), "budget=2.5 is no number"),  # type: ignore[arg-type]
        (lambda: FixedBudgetSampler(cap=0.5), "cap=0.5"),
        (lambda: RunSampler(run_length=0.5), "run_length=0.5 is less than one chunk"),
        (lambda: ChunkConfig(chunk_size=4, sampler="importance"), "has no method draw"),  # type: ignore[arg-type]
        (lambda: ChunkConfig(chunk_size=4, control_variate=True), "control_variate=True needs a sampler"),
        (
            lambda: ChunkConfig(
                chunk_size=4, sampler=IndependentSampler(), layers_per_group=2, control_variate=True
            ),
            "control_variate=True needs a sampler and layers_per_group=1",
        ),
    ],
)
def test_bad_values(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "weights",
    [
        torch.ones(3),
        torch.full((NUM_CHUNKS,), float("nan")),
        -torch.ones(NUM_CHUNKS),
        torch.ones(2, NUM_CHUNKS),
        torch.ones(NUM_CHUNKS, NUM_CHUNKS).fill_diagonal_(0),  # relays to chunks that are dropped
    ],
)
def test_a_users_sampler_that_draws_nonsense(weights: Tensor) -> None:
    sampler = Fixed()
    sampler.weights = weights
    with pytest.raises(ValueError, match=r"Fixed\.draw (returned|gives a relay)"):
        gradients(make_model(sampler, 1), batch(num_tokens=NUM_CHUNKS * CHUNK_SIZE))


@pytest.mark.parametrize("control_variate", [True, False])
def test_dropped_chunks_cost_nothing(control_variate: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    reruns: list[int] = []
    rebuilt: list[tuple[int, int]] = []
    sampler = Fixed()
    sampler.weights = torch.tensor([0.0, 0, 3, 0, 3, 0])
    model = make_model(sampler, 1, control_variate=control_variate)
    model.train()
    loss = model(**batch(num_tokens=24)).loss
    real_rerun, real_write = GroupCall._rerun, KVStore.write
    monkeypatch.setattr(
        GroupCall, "_rerun", lambda run, index, hidden: reruns.append(index) or real_rerun(run, index, hidden)
    )
    monkeypatch.setattr(
        KVStore,
        "write",
        lambda store, chunk, *kv: rebuilt.append((chunk.start, chunk.end)) or real_write(store, chunk, *kv),
    )
    loss.backward()
    layers = [i for i in reruns if i in (2, 4)]
    assert layers.count(2) == layers.count(4) == 2 + 1, "two layers, and the final norm, which is exact"
    assert sorted(set(reruns) - {2, 4}) == [0, 1, 3, 5], "by the final norm alone"
    assert reruns.count(0) == reruns.count(5) == 1
    assert sorted(set(rebuilt)) == [(0, 16), (8, 12), (16, 20)], "all that is read, at once; then kept ones"


def test_nothing_kept_at_all() -> None:
    sampler = Fixed()
    sampler.weights = torch.zeros(NUM_CHUNKS)
    grads = gradients(make_model(sampler, 1), batch(num_tokens=NUM_CHUNKS * CHUNK_SIZE))
    exact = gradients(make_model(None, 1), batch(num_tokens=NUM_CHUNKS * CHUNK_SIZE))
    assert grads.keys() == exact.keys(), "every parameter has a gradient: sharding engines wait for it"
    for name in ("lm_head.weight", "model.norm.weight"):
        torch.testing.assert_close(grads[name], exact[name])
    assert not grads["model.layers.0.mlp.up_proj.weight"].any()


def test_lora_retained_chunks_and_report() -> None:
    config = ChunkConfig(chunk_size=CHUNK_SIZE, sampler=IndependentSampler(budget=3), retained_chunks=2)
    kept_graphs = chunk_model(with_lora(tiny_llama()), config)
    torch.manual_seed(0)
    retained = gradients(kept_graphs, batch(num_tokens=24))
    model = chunk_model(
        with_lora(tiny_llama()), ChunkConfig(chunk_size=CHUNK_SIZE, sampler=IndependentSampler(budget=3))
    )
    torch.manual_seed(0)
    rerun = gradients(model, batch(num_tokens=24))
    assert largest_difference(retained, rerun) < 1e-12, "graphs that are kept get their weights too"
    report = chunk_report(model).sample
    assert report is not None
    assert report.num_chunks == 6
    assert report.tokens_kept == CHUNK_SIZE * report.num_kept
    gradients(model, batch(num_rows=2, num_tokens=24))
    of_two_rows = chunk_report(model).sample
    assert of_two_rows is not None
    assert of_two_rows.tokens_kept == 2 * CHUNK_SIZE * of_two_rows.num_kept
    assert report.largest_weight == 2
    assert report.relative_variance > 0


def test_draws_come_from_the_default_generator() -> None:
    model = make_model(IndependentSampler(budget=3), 1)
    torch.manual_seed(5)
    first = gradients(model, batch(num_tokens=NUM_CHUNKS * CHUNK_SIZE))
    second = gradients(model, batch(num_tokens=NUM_CHUNKS * CHUNK_SIZE))
    torch.manual_seed(5)
    assert largest_difference(gradients(model, batch(num_tokens=NUM_CHUNKS * CHUNK_SIZE)), first) == 0
    assert largest_difference(second, first) > 0
