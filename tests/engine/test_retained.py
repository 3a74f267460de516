"""Chunks that nothing reads keep no K/V; the last ones of a stream keep their graphs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from chunkdist import ChunkConfig, chunk_model
from chunkdist.chunking import chunk_report, model_sizes, resolve_auto_values
from chunkdist.data.assignment import plan_batch
from chunkdist.data.cost import SequenceCost
from chunkdist.data.long_tail import long_tailed_lengths
from chunkdist.data.streams import join_sequences, stream_of
from chunkdist.engine.group import GroupCall
from chunkdist.memory.auto import USABLE_SHARE, resolve_auto
from chunkdist.memory.live_bytes import LiveBytes
from tests.helpers.models import batch, gradients, largest_difference, packed_batch, tiny_llama, with_lora


class TestRuns:
    @pytest.mark.parametrize(
        ("lengths", "runs"),
        [
            ([40], [(0, 5)]),  # one sequence: each chunk reads all before it
            ([8, 8, 24], [(0, 1), (1, 2), (2, 5)]),  # sequences that end where chunks do
            ([3, 5, 12, 4, 2], [(0, 1), (1, 3), (3, 4)]),
            ([7, 2, 7], [(0, 2)]),
            ([5], [(0, 1)]),
        ],
    )
    def test_runs(self, lengths: list[int], runs: list[tuple[int, int]]) -> None:
        assert [(run.start, run.stop) for run in stream_of(lengths, 8).runs()] == runs

    def test_the_last_chunks_are_retained(self) -> None:
        """However many runs the stream has."""
        stream = stream_of([8, 24, 16], 8)
        assert [list(stream.retained(num)) for num in (0, 1, 3)] == [[], [5], [3, 4, 5]]
        assert list(stream.retained(9)) == list(range(6))


def reruns_of(model: Any, inputs: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The chunks that the backward of the last layer runs again."""
    seen: list[int] = []
    rerun: Callable[..., Any] = GroupCall._rerun

    def noted(self: GroupCall, index: int, hidden: Tensor) -> Any:
        if self.group.is_last:
            seen.append(index)
        return rerun(self, index, hidden)

    monkeypatch.setattr(GroupCall, "_rerun", noted)
    gradients(model, inputs)
    return seen


@pytest.mark.parametrize(
    ("lengths", "retained", "rerun"),
    [
        ([8, 24, 8], 1, [3, 2, 1, 0]),
        ([8, 24, 8], 0, [4, 3, 2, 1, 0]),
        ([5, 3], 1, []),  # one chunk: nothing is recomputed
        ([8, 8, 8], 2, [0]),
    ],
)
def test_what_is_run_again(
    lengths: list[int], retained: int, rerun: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = chunk_model(tiny_llama(num_layers=2), ChunkConfig(chunk_size=8, retained_chunks=retained))
    assert reruns_of(model, packed_batch(lengths), monkeypatch) == rerun


@pytest.mark.parametrize("height", [1, 2, "all"])
@pytest.mark.parametrize("retained", [0, 1, 2])
@pytest.mark.parametrize("rebuild_kv", ["auto", False])
def test_streams_of_several_runs_are_exact(height: Any, retained: int, rebuild_kv: Any) -> None:
    inputs = packed_batch([7, 14, 5, 2, 9])
    config = ChunkConfig(
        chunk_size=7,
        layers_per_group=height,
        retained_chunks=retained,
        rebuild_kv=rebuild_kv,
        attention="math",
    )
    found = gradients(chunk_model(tiny_llama(), config), inputs)
    assert largest_difference(found, gradients(tiny_llama(), inputs)) < 1e-10


def peak_bytes(model: Any, streams: list[dict[str, Tensor]]) -> int:
    """The largest sum of live tensors over the weights and their gradients."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    kept = [*model.parameters(), *(p.grad for p in model.parameters()), *model.buffers()]
    with LiveBytes(exclude=kept) as live:
        for stream in streams:
            model(**stream, use_cache=False).loss.backward()
    return live.peak_bytes


def wide_llama(config: ChunkConfig) -> Any:
    """Keys and values are most of what grows with the sequence."""
    settings = {"num_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 32}
    return chunk_model(tiny_llama(dtype=torch.float32, **settings), config)


@pytest.mark.parametrize("rebuild_kv", [True, False])
def test_only_a_run_has_keys_and_values(rebuild_kv: bool) -> None:
    """Eight sequences of a chunk each take those of one chunk; one sequence of eight chunks, of all eight."""
    config = ChunkConfig(chunk_size=32, layers_per_group="all", rebuild_kv=rebuild_kv)
    model = wide_llama(config)
    short, long = (peak_bytes(model, [packed_batch(lengths)]) for lengths in ([32] * 8, [256]))
    one_token = 2 * 8 * 32 * 4 * 2  # K and V, heads, head dim, fp32, layers
    kept_of_seven_chunks = 7 * 32 * one_token * 2  # and their gradients
    assert long - short > 0.9 * kept_of_seven_chunks


@pytest.mark.parametrize("retained", [0, 1, 2])
def test_the_peak_is_set_by_the_longest_sequence_and_the_chunk(retained: int) -> None:
    """A long-tailed set, scaled down: global batches of 8 and of 32 sequences need no more memory than the
    longest sequence alone, nor do streams of as many tokens in many runs."""
    lengths = [*long_tailed_lengths(31, divisor=40, seed=2), 192]
    longest = max(lengths)
    assert longest == 192
    samples = [batch(num_tokens=length, seed=length) for length in lengths]
    for sample in samples:
        sample.update({name: tensor[0] for name, tensor in sample.items()})
    model = wide_llama(ChunkConfig(chunk_size=32, retained_chunks=retained))
    alone = peak_bytes(model, [join_sequences([samples[-1]])])
    peaks = []
    for num_sequences in (8, 32):
        of_batch = lengths[-num_sequences:]
        plan = plan_batch(
            of_batch, num_ranks=1, cost=SequenceCost.of(model), budget_tokens=longest, chunk_size=32
        )
        streams = [
            join_sequences([samples[len(lengths) - num_sequences + index] for index in stream])
            for stream in plan.streams[0]
        ]
        assert max(stream["input_ids"].shape[1] for stream in streams) <= longest
        peaks.append(peak_bytes(model, streams))
    assert sum(lengths) > 2 * longest
    assert max(peaks) <= 1.02 * alone
    for run_tokens in (32, 64):  # one chunk, two chunks
        assert peak_bytes(model, [packed_batch([run_tokens] * (longest // run_tokens))]) <= 1.02 * alone
    config = ChunkConfig(chunk_size=16, retained_chunks=retained)
    half = peak_bytes(wide_llama(config), [join_sequences([samples[-1]])])
    assert half < alone
    shorter = peak_bytes(model, [batch(num_tokens=96)])
    assert shorter < 0.7 * alone


class TestAuto:
    def chosen(self, available_bytes: int | None) -> tuple[int, str]:
        model = self.model
        config, reason = resolve_auto(
            model, self.config, model_sizes(model), num_tokens=160, available_bytes=available_bytes
        )
        return int(config.retained_chunks), reason

    config = ChunkConfig(chunk_size=16, retained_chunks="auto")

    @pytest.fixture(autouse=True)
    def _model(self) -> None:
        self.model: Any = chunk_model(tiny_llama(dtype=torch.float32), self.config)

    def test_on_a_cpu_it_is_half_of_what_is_free(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("chunkdist.memory.auto.free_host_bytes", lambda: 3000 * 1024)
        assert 0 < self.chosen(None)[0] == self.chosen(1500 * 1024)[0] < self.chosen(3000 * 1024)[0]

    def test_follows_from_the_memory(self) -> None:
        assert self.chosen(0)[0] == 0
        assert self.chosen(2**40)[0] == 10
        counts = [self.chosen(kib * 1024)[0] for kib in range(0, 4000, 100)]
        assert counts == sorted(counts)
        assert len(set(counts)) > 5
        num_chunks, reason = self.chosen(2**40)
        assert f"auto: {num_chunks} of the 10 chunks of 160 tokens" in reason

    def test_a_step_fits_into_what_was_allowed(self) -> None:
        """Where some chunks are allowed, not all, what the real step holds is covered by the margin."""
        for kib in (700, 900, 1300):
            num_chunks, _ = self.chosen(kib * 1024)
            assert 0 < num_chunks < 10
            context = self.model._chunkdist_model.context
            context.resolve(replace(self.config, retained_chunks=num_chunks), "as in this test")
            peak = peak_bytes(self.model, [batch(num_tokens=160)])
            assert peak * USABLE_SHARE["cuda"] <= kib * 1024

    def test_is_resolved_once_in_the_first_step(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = chunk_model(tiny_llama(), ChunkConfig(chunk_size=16, retained_chunks="auto"))
        assert chunk_report(model).retained_chunks == 0
        inputs = batch(num_tokens=48)
        found = gradients(model, inputs)
        assert largest_difference(found, gradients(tiny_llama(), inputs)) < 1e-10
        report = chunk_report(model)
        assert report.retained_chunks == 3
        resolve_auto_values(model, num_tokens=16)
        assert chunk_report(model) == report
        assert reruns_of(model, inputs, monkeypatch) == []

    def test_under_peft(self) -> None:
        """It passes `inputs_embeds=None`."""
        model: Any = with_lora(tiny_llama())
        chunk_model(model, ChunkConfig(chunk_size=16, retained_chunks="auto"))
        gradients(model, batch(num_tokens=48))
        assert chunk_report(model).retained_chunks == 3

    def test_without_room_keys_and_values_are_rebuilt(self) -> None:
        model: Any = chunk_model(tiny_llama(), ChunkConfig(chunk_size=8, retained_chunks="auto"))
        context = model._chunkdist_model.context
        context.resolve(replace(context.requested, retained_chunks=0), "no room")
        assert chunk_report(model).rebuilds_kv
