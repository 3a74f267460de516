"""The planner keeps to its memory, takes the fastest, says what is missing; `"auto"` runs what it chose."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from chunkdist import ChunkConfig, IndependentSampler, chunk_model
from chunkdist.chunking import chunk_report, layers_of, resolve_auto_values
from chunkdist.memory.cards import CARDS
from chunkdist.memory.model_sizes import ModelSizes
from chunkdist.memory.planner import Job, NothingFits, longest_length, plan_as_configured, plan_step
from chunkdist.memory.sharded import Engine
from chunkdist.memory.simulate import check_groups, simulate
from chunkdist.models.flops import StepFlops
from tests.helpers.models import batch, gradients, largest_difference, tiny_llama, with_lora

AUTO = ChunkConfig(chunk_size="auto", layers_per_group="auto", retained_chunks="auto", offload="auto")
MIB = 2**20


@pytest.fixture(scope="module")
def job() -> Job:
    model = with_lora(tiny_llama(dtype=torch.bfloat16, num_layers=8, hidden_size=64))
    return Job(
        sizes=ModelSizes.for_config(model, AUTO, device_type="cuda"),
        flops=StepFlops.of(model),
        card=CARDS["rtx3090"],
        available_bytes=64 * MIB,
        host_bytes=64 * MIB,
    )


def test_the_plan_fits_and_more_memory_is_not_slower(job: Job) -> None:
    times = []
    for mib in (24, 32, 64, 256, 1024):
        roomy = replace(job, available_bytes=mib * MIB)
        plan = plan_step(roomy, AUTO, 16384)
        assert plan.estimate.peak_bytes <= mib * MIB
        assert plan.estimate.host_bytes <= job.host_bytes
        assert not plan.config.has_auto
        times.append(plan.time.seconds)
    assert all(after <= 1.03 * before for before, after in pairwise(times))
    assert times[-1] < times[0]


def test_ranks_that_share_rows(job: Job) -> None:
    """Memory is cut by them but for two kinds of copies, time but for the exchange."""
    shared = replace(job, sequence_ranks=4)
    config = ChunkConfig(chunk_size=4096)
    alone, part = (each.estimate(config, 65536) for each in (job, shared))
    assert 0.25 <= part.sequence_bytes / alone.sequence_bytes <= 0.51  # 2 kv heads on 4 ranks are there twice
    assert 2 * longest_length(job, AUTO) <= longest_length(shared, AUTO) <= 4 * longest_length(job, AUTO)
    assert int(plan_step(shared, AUTO, 16384).config.chunk_size) % (4 * 512) == 0
    large = replace(config, chunk_size=32768)  # a rank's heads keep its card busy
    times = [plan_as_configured(each, large, 65536).time for each in (job, shared)]
    assert times[0].exchange_s == 0 < times[1].exchange_s
    assert times[1].compute_s < times[0].compute_s / 2


def test_what_is_set_stays(job: Job) -> None:
    asked = replace(AUTO, chunk_size=1024, offload="none")
    plan = plan_step(replace(job, available_bytes=1024 * MIB), asked, 8192)
    assert (plan.config.chunk_size, plan.config.offload) == (1024, "none")
    assert plan.config.retained_chunks == 8, "there is room for all graphs"


def test_where_nothing_fits_the_least_is_named(job: Job) -> None:
    with pytest.raises(NothingFits, match=r"16,384 tokens need .* GiB on the device") as caught:
        plan_step(replace(job, available_bytes=MIB), AUTO, 16384)
    assert caught.value.nearest.estimate.peak_bytes > MIB


def test_the_longest_length_is_the_longest(job: Job) -> None:
    longest = longest_length(job, AUTO)
    assert longest % 1024 == 0
    plan_step(job, AUTO, longest)
    with pytest.raises(NothingFits):
        plan_step(job, AUTO, longest + 1024)
    assert longest_length(replace(job, available_bytes=2 * job.available_bytes), AUTO) > longest
    assert longest_length(replace(job, host_bytes=0), AUTO) < longest


def test_zero3_has_groups_of_one_layer(job: Job) -> None:
    sharded = replace(job, engine=Engine(name="zero3", num_ranks=4), available_bytes=1024 * MIB)
    assert plan_step(sharded, AUTO, 4096).config.layers_per_group == 1


@pytest.mark.parametrize(
    ("settings", "num_tokens"),
    [
        ({"layers_per_group": 2, "rebuild_kv": True}, 1024),
        ({"layers_per_group": 2, "rebuild_kv": False, "offload": "host"}, 1024),
        ({"layers_per_group": 2, "rebuild_kv": True, "keep_attention": True}, 1024),
        ({"layers_per_group": 2, "keep_attention": True, "offload": "host"}, 1024),
    ],
)
def test_the_formula_is_within_5_percent_of_the_simulation(
    job: Job, settings: dict[str, Any], num_tokens: int
) -> None:
    model = with_lora(tiny_llama(dtype=torch.bfloat16, num_layers=8, hidden_size=64))
    config = ChunkConfig(**{"chunk_size": 256, "keep_attention": False, **settings})
    found = simulate(model, job.sizes, config, num_tokens=num_tokens)
    assert job.estimate(config, num_tokens).step_bytes == pytest.approx(found.peak_bytes, rel=0.05)
    assert found.num_layers_run == 2
    if "offload" not in settings:
        check_groups(model, job.sizes, config, num_tokens=num_tokens)


def test_attention_is_kept_where_it_fits_and_pays(job: Job) -> None:
    config, num_tokens = ChunkConfig(chunk_size=16384), 2**20
    roomy = replace(job, available_bytes=2**40)
    assert plan_as_configured(roomy, config, num_tokens).config.keeps_attention
    assert not plan_as_configured(roomy, config, 512).config.keeps_attention, "attention is a small part"
    kept, without = (
        job.estimate(replace(config, keep_attention=keep), num_tokens).peak_bytes for keep in (True, False)
    )
    assert plan_as_configured(replace(job, available_bytes=kept), config, num_tokens).config.keeps_attention
    assert not plan_as_configured(
        replace(job, available_bytes=kept - 1), config, num_tokens
    ).config.keeps_attention
    per_token = 8 * (2 * 64 + 4 * 4)  # eight layers: 64 numbers in bf16, and 4 heads' log-sum-exps in fp32
    assert kept - without == pytest.approx(num_tokens * per_token, rel=0.05)
    longer = replace(config, layers_per_group=4, rebuild_kv=True)
    plans = [
        plan_as_configured(roomy, replace(longer, keep_attention=keep), num_tokens) for keep in (True, False)
    ]
    assert plans[0].time.seconds < plans[1].time.seconds


def test_windowed_layers_keep_nothing_where_only_the_others_pay() -> None:
    """Seven of eight layers see 256 tokens: what they return is seven eighths of the bytes, for nothing."""
    settings = Qwen2Config(
        vocab_size=61,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_sliding_window=True,
        sliding_window=256,
        layer_types=["sliding_attention"] * 7 + ["full_attention"],
    )
    model = with_lora(AutoModelForCausalLM.from_config(settings).bfloat16())
    job = Job(
        sizes=ModelSizes.for_config(model, AUTO, device_type="cuda"),
        flops=StepFlops.of(model),
        card=CARDS["rtx3090"],
        available_bytes=2**40,
        host_bytes=0,
    )
    config, num_tokens = ChunkConfig(chunk_size=16384), 2**20
    chosen = plan_as_configured(job, config, num_tokens)
    assert chosen.config.keep_attention == "global"
    every, none = (
        plan_as_configured(job, replace(config, keep_attention=keep), num_tokens) for keep in (True, False)
    )
    kept = [plan.estimate.peak_bytes - none.estimate.peak_bytes for plan in (every, chosen)]
    assert kept[0] == pytest.approx(8 * kept[1], rel=0.02)
    within = [
        job.estimate(ChunkConfig(chunk_size=64, keep_attention=keep), 256).step_bytes
        for keep in ("global", True)  # a window as long as the row is none
    ]
    assert within[0] == within[1]
    short = ChunkConfig(chunk_size=1024, keep_attention="global")
    found = simulate(model, job.sizes, short, num_tokens=4096).peak_bytes
    assert job.estimate(short, 4096).step_bytes == pytest.approx(found, rel=0.05)


class TestKeepAttention:
    """`keep_attention="auto"` beside values that are set."""

    @pytest.fixture
    def model(self) -> Any:
        return chunk_model(tiny_llama(num_layers=2), ChunkConfig(chunk_size=16))

    def test_little_is_kept_without_an_estimate(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("chunkdist.chunking.model_sizes", None)
        assert not chunk_report(model).keeps_attention
        gradients(model, batch(num_tokens=48))
        report = chunk_report(model)
        assert (report.keeps_attention, report.reason) == (True, "as configured")
        assert report.keep_reason == "auto: they take less than 1% of what is free"

    def test_longer_rows_ask_again(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        gradients(model, batch(num_tokens=20))
        monkeypatch.setattr("chunkdist.memory.auto.free_bytes", lambda device: 100_000)
        gradients(model, batch(num_tokens=20))
        assert chunk_report(model).keeps_attention
        gradients(model, batch(num_tokens=48))
        report = chunk_report(model)
        assert not report.keeps_attention
        assert "no room" in report.keep_reason
        assert (
            largest_difference(
                gradients(model, batch(num_tokens=48)),
                gradients(tiny_llama(num_layers=2), batch(num_tokens=48)),
            )
            < 1e-10
        )

    def test_sampled_chunks_keep_nothing(self) -> None:
        config = ChunkConfig(chunk_size=16, sampler=IndependentSampler(budget=2))
        model = chunk_model(tiny_llama(num_layers=2), config)
        gradients(model, batch(num_tokens=48))
        assert not chunk_report(model).keeps_attention
        assert "dropped chunks" in chunk_report(model).keep_reason

    def test_what_cannot_be_estimated_is_not_kept(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        def fails(*args: Any) -> Any:
            raise RuntimeError("experts")

        monkeypatch.setattr("chunkdist.chunking.model_sizes", fails)
        monkeypatch.setattr("chunkdist.memory.auto.SMALL_SHARE", 0)
        gradients(model, batch(num_tokens=48))
        report = chunk_report(model)
        assert not report.keeps_attention
        assert report.keep_reason == "auto: memory cannot be estimated (RuntimeError: experts)"


class TestAuto:
    @pytest.fixture
    def model(self) -> Iterator[Any]:
        model: Any = chunk_model(tiny_llama(), AUTO)
        yield model
        model._chunkdist_model.remove()

    def test_the_first_step_chooses_and_is_exact(self, model: Any) -> None:
        assert chunk_report(model).reason == "auto: chosen in the first step"
        inputs = batch(num_tokens=48)
        found = gradients(model, inputs)
        assert largest_difference(found, gradients(tiny_llama(), inputs)) < 1e-10
        report = chunk_report(model)
        assert not report.config.has_auto
        assert report.reason.startswith("auto: chunk_size=512, layers_per_group=")

    @pytest.mark.parametrize("offload", ["none", "host"])
    def test_other_groups_are_formed(self, model: Any, offload: str, monkeypatch: pytest.MonkeyPatch) -> None:
        chosen = ChunkConfig(chunk_size=8, layers_per_group=2, offload=offload)  # type: ignore[arg-type]
        monkeypatch.setattr("chunkdist.chunking.resolve_auto", lambda *args, **kwargs: (chosen, "so it is"))
        resolve_auto_values(model, num_tokens=48)
        assert (chunk_report(model).layers_per_group, chunk_report(model).reason) == (2, "so it is")
        assert (chunk_report(model).num_groups, len(layers_of(model))) == (2, 4)
        inputs = batch(num_tokens=48)
        assert largest_difference(gradients(model, inputs), gradients(tiny_llama(), inputs)) < 1e-10

    def test_without_room_there_is_one_clear_error(self, model: Any) -> None:
        with pytest.raises(ValueError, match=r"8,192 tokens need .* GiB on the device"):
            resolve_auto_values(model, num_tokens=8192, available_bytes=0)
