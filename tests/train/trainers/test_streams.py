"""Training on token streams: what is trained on, in which order, and what is said of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from chunkdist.chunking import num_computed
from chunkdist.engine.group import GroupCall
from chunkdist.errors import UnsupportedModelError
from chunkdist.train.build import ChunkSFTTrainer, build_trainer, chunk_trainer
from chunkdist.train.options.arguments import parse_options
from chunkdist.train.reports.callback import ChunkCallback
from chunkdist.train.trainers import streams as packing
from tests.helpers.tiny_run import command_line

Rows = list[dict[str, Any]]
LENGTHS = (23, 45, 3, 60, 7, 31, 2, 18)


def rows(lengths: tuple[int, ...] = LENGTHS) -> Rows:
    """Every sequence begins with a token of its own."""
    made = []
    for number, length in enumerate(lengths):
        ids = [number, *((7 * number + 3 * position) % 200 for position in range(1, length))]
        made.append({"input_ids": ids, "labels": [-100, *ids[1:]]})
    return made


def trainer_of(model: Path, samples: Rows, **values: Any) -> Any:
    values = {"chunk_packing": True, "optim": "sgd", "learning_rate": 0.1, "report_to": "none", **values}
    trainer, config = build_trainer(parse_options(command_line(model, samples, **values)))
    chunk_trainer(trainer, config)
    ChunkCallback.add_to(trainer, config)
    return trainer


def weights(trainer: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def seen_ids(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The first tokens of the sequences of each optimizer step, noted as they reach the model."""
    steps: list[list[int]] = []
    real = type(trainer).get_batch_samples

    def noted(self: Any, *args: Any) -> Any:
        items, num_items = real(self, *args)
        streams = [stream for item in items for stream in item if "position_ids" in stream]
        starts = [stream["input_ids"][stream["position_ids"] == 0].tolist() for stream in streams]
        steps.append(sorted(token for stream in starts for token in stream))
        return items, num_items

    monkeypatch.setattr(type(trainer), "get_batch_samples", noted)
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    monkeypatch.undo()
    return steps


@pytest.mark.parametrize(
    "values",
    [
        {"per_device_train_batch_size": 8},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        {"per_device_train_batch_size": 8, "retained_chunks": "auto"},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 12},  # some have no sequence
    ],
)
def test_trains_as_without_packing(tiny_model: Path, values: dict[str, Any]) -> None:
    """A step on all samples, in streams of at most 64 tokens, is the step on the padded batch of them; so is
    what is logged of its tokens."""
    plain = trainer_of(
        tiny_model,
        rows(),
        chunk_packing=False,
        chunk_method="none",
        per_device_train_batch_size=8,
        max_steps=2,
    )
    packed = trainer_of(tiny_model, rows(), max_steps=2, include_num_input_tokens_seen=True, **values)
    assert isinstance(packed, ChunkSFTTrainer)
    before = weights(packed)
    torch.testing.assert_close(before, weights(plain), rtol=0, atol=0)
    plain.train()
    packed.train()
    update, expected = weights(packed) - before, weights(plain) - before
    assert expected.norm() > 1e-2
    assert (update - expected).norm() < 1e-4 * expected.norm()
    for name in ("loss", "grad_norm", "entropy", "mean_token_accuracy"):
        logged = [[entry[name] for entry in t.state.log_history if "loss" in entry] for t in (plain, packed)]
        assert logged[1] == pytest.approx(logged[0], rel=1e-3), name
    num_tokens = 2 * sum(LENGTHS)
    assert packed.state.num_input_tokens_seen == num_tokens
    assert packed.state.total_flos == 6 * num_tokens * packed.model.num_parameters(exclude_embeddings=True)


def with_prompts() -> Rows:
    """Three prompts, each in four samples, mixed."""
    made = []
    for number in range(12):
        prompt = [(31 * (number % 3) + 3 * position) % 200 for position in range(40)]
        ids = prompt + [(7 * number + 5 * position) % 200 for position in range(6 + number)]
        made.append({"input_ids": ids, "labels": [-100] * 40 + ids[40:]})
    return made


@pytest.mark.parametrize(
    "values", [{}, {"chunk_share_prefixes": "true"}, {"chunk_share_prefixes": "false"}], ids=str
)
def test_a_prompt_is_computed_once_and_planned_so(tiny_model: Path, values: dict[str, Any]) -> None:
    """Streams of at most 140 tokens: one for each prompt, where its samples meet. What is planned is what the
    model computes, and trains as the padded batch does."""
    plain = trainer_of(
        tiny_model,
        with_prompts(),
        chunk_packing=False,
        chunk_method="none",
        per_device_train_batch_size=12,
        max_steps=1,
    )
    packed = trainer_of(
        tiny_model, with_prompts(), per_device_train_batch_size=12, max_steps=1, max_length=140, **values
    )
    before = weights(packed)
    plain.train()
    packed.train()
    expected = weights(plain) - before
    assert (weights(packed) - before - expected).norm() < 1e-4 * expected.norm()
    out = tiny_model.parent / "out"
    (tokens,) = json.loads((out / "packing.jsonl").read_text())["tokens"]
    assert sum(tokens) == num_computed(packed.model)
    if values.get("chunk_share_prefixes") != "false":
        assert sum(tokens) == len(
            {tuple(row["input_ids"][: n + 1]) for row in with_prompts() for n in range(len(row["input_ids"]))}
        )
        assert len(tokens) == 3
    else:
        assert sum(tokens) == sum(len(row["input_ids"]) for row in with_prompts())


def test_resuming_neither_repeats_nor_skips(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in the middle of the second epoch: 3 steps an epoch, the last one smaller."""
    values = {
        "per_device_train_batch_size": 3, "gradient_accumulation_steps": 1, "max_steps": 8,
        "save_strategy": "steps", "save_steps": 4,
    }  # fmt: skip
    whole = trainer_of(tiny_model, rows(), **values)
    steps = seen_ids(whole, monkeypatch)
    for epoch in (steps[:3], steps[3:6]):
        assert sorted(token for step in epoch for token in step) == list(range(8))
    assert steps[:3] != steps[3:6], "another order in each epoch"
    checkpoint = tiny_model.parent / "out" / "checkpoint-4"
    resumed = trainer_of(tiny_model, rows(), resume_from_checkpoint=checkpoint, **values)
    assert seen_ids(resumed, monkeypatch) == steps[4:]
    torch.testing.assert_close(weights(resumed), weights(whole), rtol=0, atol=1e-6)
    lines = [
        json.loads(line) for line in (tiny_model.parent / "out" / "packing.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines] == list(range(1, 9))


def test_what_is_reported(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = trainer_of(
        tiny_model, rows(), per_device_train_batch_size=8, retained_chunks=1, logging_steps=2
    )
    assert trainer.stream_tokens == 64
    trainer.train()
    out = tiny_model.parent / "out"
    (figures,) = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    (line,) = map(json.loads, (out / "packing.jsonl").read_text().splitlines())
    (tokens,) = line["tokens"]
    assert sum(tokens) == 2 * sum(LENGTHS)
    assert max(tokens) <= 64
    assert figures["packing_micro_batches"] == len(tokens)
    assert figures["packing_imbalance"] == 1
    assert figures["num_tokens_seen"] == 2 * sum(LENGTHS)
    slots = sum(-(-number // 16) * 16 for number in tokens)
    assert figures["packing_empty_share"] == pytest.approx(1 - 2 * sum(LENGTHS) / slots)
    assert 0 < figures["packing_recomputed_share"] < 1
    flops = trainer.stream_sampler().cost
    assert sum(line["flops"][0]) == 2 * sum(map(flops, LENGTHS))
    assert (out / "lengths.png").stat().st_size > 5000


def test_steps_after_the_last_log_line_are_reported(tiny_model: Path) -> None:
    trainer = trainer_of(tiny_model, rows(), per_device_train_batch_size=8, logging_steps=2, max_steps=3)
    trainer.train()
    lines = (tiny_model.parent / "out" / "packing.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 3]
    assert trainer.state.log_history[-1]["packing_imbalance"] == 1


def test_what_a_sampler_drops_is_not_recomputed(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(
        tiny_model,
        rows(),
        per_device_train_batch_size=8,
        chunk_method="spaco",
        spaco_budget=2,
        retained_chunks=1,
        max_steps=1,
    )
    rerun, num_tokens = GroupCall._rerun, []

    def noted(self: GroupCall, index: int, hidden: torch.Tensor) -> Any:
        if self.group.is_last and not isinstance(hidden, FakeTensor):  # the estimate counts with those
            num_tokens.append(self.stream.chunks[index].num_tokens)
        return rerun(self, index, hidden)

    monkeypatch.setattr(GroupCall, "_rerun", noted)
    trainer.train()
    figures = json.loads((tiny_model.parent / "out" / "metrics.jsonl").read_text())
    assert 0 < sum(num_tokens) < sum(LENGTHS) / 2
    assert figures["packing_recomputed_share"] == pytest.approx(sum(num_tokens) / sum(LENGTHS))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"per_device_train_batch_size": 3}, "gradient_accumulation_steps was 4 and is 6"),
        ({"data_seed": 5}, r"data_seed \(or seed\) was 42 and is 5"),
        ({"chunk_packing": False}, "chunk_packing=True, and this job has chunk_packing=False"),
    ],
)
def test_a_run_that_cannot_go_on_is_refused(tiny_model: Path, values: dict[str, Any], words: str) -> None:
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 1}
    first = trainer_of(tiny_model, rows(), save_strategy="steps", save_steps=1, **settings)
    first.train()
    settings |= {"max_steps": 2, "resume_from_checkpoint": tiny_model.parent / "out" / "checkpoint-1"}
    with pytest.raises(ValueError, match=words):
        trainer_of(tiny_model, rows(), **{**settings, **values})
    same = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    trainer_of(tiny_model, rows(), **{**settings, **same})


def test_models_that_cannot_be_packed_are_refused(tiny_model: Path) -> None:
    """By the longest sample of all, before the first step."""
    config = json.loads((tiny_model / "config.json").read_text())
    limit = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    config |= {"rope_parameters": limit, "max_position_embeddings": 40}
    (tiny_model / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="more than 40 tokens, and one here has 60"):
        trainer_of(tiny_model, rows())


@pytest.mark.parametrize("name", ["eval_packing", "ignore_data_skip"])
def test_options_that_contradict_it_are_refused(tiny_model: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=True with chunk_packing=True"):
        trainer_of(tiny_model, rows(), **{name: True})


def test_streams_that_fill_up_are_in_no_figure_of_spaco(tiny_model: Path) -> None:
    given = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 12, "max_steps": 1}
    trainer_of(tiny_model, rows(), chunk_method="spaco", spaco_budget=100, **given).train()
    figures = json.loads((tiny_model.parent / "out" / "metrics.jsonl").read_text())
    assert figures["spaco_tokens_kept"] == sum(LENGTHS)


def test_auto_is_said_in_the_start_table(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = trainer_of(
        tiny_model, rows(), retained_chunks="auto", per_device_train_batch_size=8, max_steps=1
    )
    trainer.train()
    words = " ".join(capsys.readouterr().out.split())
    assert "retained chunks │ 4" in words
    assert "auto: 4 of the 4 chunks of 64 tokens" in words
    figures = json.loads((tiny_model.parent / "out" / "metrics.jsonl").read_text())
    assert figures["packing_recomputed_share"] == 0


def test_files_that_cannot_be_written_cost_one_line(
    tiny_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill_up(record: Any) -> None:
        raise OSError(28, "No space left on device")

    trainer = trainer_of(tiny_model, rows(), per_device_train_batch_size=8)
    monkeypatch.setattr(trainer._packing_file, "append", fill_up)
    trainer.train()
    assert capsys.readouterr().out.count("training goes on without it") == 1


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"packing": True}, "packing=True with chunk_packing=True"),
        ({"padding_free": True}, "padding_free=True with chunk_packing=True"),
        ({"chunk_method": "none"}, "chunk_packing=True with chunk_method=none"),
        ({"dataloader_drop_last": True}, "dataloader_drop_last=True"),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy=group_by_length"),
        ({"average_tokens_across_devices": False}, "average_tokens_across_devices=False"),
    ],
)
def test_options_that_contradict(tiny_model: Path, values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        trainer_of(tiny_model, rows(), **values)
    assert not (tiny_model.parent / "out").exists()


def test_a_lost_sequence_is_seen(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison with the padded batch fails when a stream is lost."""
    packed = trainer_of(tiny_model, rows(), per_device_train_batch_size=8, max_steps=1)
    before = weights(packed)
    packed.train()
    whole = weights(packed) - before
    real = packing.collate_streams
    monkeypatch.setattr(packing, "collate_streams", lambda streams, *given: real(streams, *given)[:-1])
    lossy = trainer_of(tiny_model, rows(), per_device_train_batch_size=8, max_steps=1)
    lossy.train()
    assert (weights(lossy) - before - whole).norm() > 1e-2 * whole.norm()
