"""A run that is resumed goes on as if it had never stopped, under every engine; what it saves loads."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from torch import distributed
from transformers import AutoModelForCausalLM

from chunkdist.train.checkpoints import whole as checkpoints
from chunkdist.train.checkpoints.files import FILE_LIST
from tests.distributed.hub import train_and_push
from tests.distributed.launched import (
    arguments_of,
    figures,
    save_initial_model,
    train,
    train_and_die,
    train_in_vain,
)
from tests.distributed.ranks import RankError, Ranks
from tests.helpers.tiny_run import TEXTS, make_model_folder

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")

ROWS = TEXTS * 3
OPTIONS: dict[str, Any] = {
    "max_steps": 4,
    "save_strategy": "steps",
    "save_steps": 2,
    "chunk_method": "spaco",
    "spaco_budget": 2,
    "lr_scheduler_type": "linear",
    "seed": 5,
}
LORA = {"use_peft": True, "lora_target_modules": "all-linear", "lora_dropout": 0.2}
ENGINES, TRAININGS = ("ddp", "fsdp2", "zero1", "zero2", "zero3"), ("full", "LoRA")
FIGURES = ("loss", "learning_rate", "grad_norm", "num_tokens_seen", "spaco_tokens_kept")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_model_folder(tmp_path_factory.mktemp("resume") / "model")
    save_initial_model(folder)
    return folder


@pytest.fixture
def folder(model: Path, tmp_path: Path) -> Path:
    shutil.copytree(model, tmp_path / "model")
    return tmp_path


def run(ranks: Ranks, engine: str, folder: Path, **options: Any) -> dict[int, tuple[float, ...]]:
    statuses = ranks.run(train, *arguments_of(engine, folder, ROWS, **{**OPTIONS, **options}))
    assert statuses == [0] * ranks.num_ranks
    assert not list((folder / "out").glob(".unfinished*"))
    of_spaco = {**OPTIONS, **options}["chunk_method"] == "spaco"
    return figures(folder, *(name for name in FIGURES if of_spaco or not name.startswith("spaco")))


def loaded(folder: Path, *, lora: bool) -> dict[str, torch.Tensor]:
    """In this one process."""
    kind = AutoPeftModelForCausalLM if lora else AutoModelForCausalLM
    state = dict(kind.from_pretrained(folder / "out").state_dict())
    assert all(value.numel() for value in state.values())
    return state


@pytest.mark.parametrize("training", TRAININGS)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_resumed_run_goes_on_as_the_whole_one(
    two_ranks: Ranks, folder: Path, engine: str, training: str
) -> None:
    lora = training == "LoRA"
    options = LORA if lora else {}
    whole = run(two_ranks, engine, folder, **options)
    assert list(whole) == [1, 2, 3, 4]
    weights = loaded(folder, lora=lora)
    shutil.rmtree(folder / "out" / "checkpoint-4")
    shutil.copytree(folder / "out" / "checkpoint-2", folder / "out" / "checkpoint-9")
    (folder / "out" / "checkpoint-9" / "trainer_state.json").unlink()  # not complete: to be passed over
    resumed = run(two_ranks, engine, folder, resume_from_checkpoint=True, **options)
    assert resumed == whole
    for name, value in loaded(folder, lora=lora).items():
        assert torch.equal(value, weights[name]), name


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_a_resumed_stream_goes_on_behind_what_all_ranks_saw(
    two_ranks: Ranks, folder: Path, engine: str
) -> None:
    streaming = {"dataset_streaming": True, "long_samples": "drop", "train_sampling_strategy": "sequential"}
    whole = run(two_ranks, engine, folder, **streaming)
    assert len(set(whole.values())) == 4
    shutil.rmtree(folder / "out" / "checkpoint-4")
    assert run(two_ranks, engine, folder, resume_from_checkpoint=True, **streaming) == whole


def test_a_run_that_was_killed_ends_as_one_that_was_not(folder: Path, two_ranks: Ranks) -> None:
    """One rank in a step (FSDP2), then all ranks with a checkpoint half written (ZeRO-3)."""
    expected = {}
    for engine in ("fsdp2", "zero3"):
        expected[engine] = run(two_ranks, engine, folder)
        shutil.rmtree(folder / "out")
    fsdp2 = arguments_of("fsdp2", folder, ROWS, **OPTIONS)
    with pytest.raises(RankError, match="rank 1 failed:\ndied with exit code -9"):
        two_ranks.run(train_and_die, "in a step", 4, (1,), *fsdp2)
    assert run(two_ranks, "fsdp2", folder, resume_from_checkpoint=True) == expected["fsdp2"]
    shutil.rmtree(folder / "out")
    zero3 = arguments_of("zero3", folder, ROWS, **OPTIONS)
    with pytest.raises(RankError, match="died with exit code -9"):
        two_ranks.run(train_and_die, "in a save", 4, (0, 1), *zero3)
    assert [path.name for path in (folder / "out").glob("checkpoint-*")] == ["checkpoint-2"]
    assert run(two_ranks, "zero3", folder, resume_from_checkpoint=True) == expected["zero3"]


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_a_run_goes_on_with_ranks_that_share_rows_or_no_longer_do(
    two_ranks: Ranks, folder: Path, engine: str
) -> None:
    """A rank a sample, or both for two: a step has the same samples."""
    exact = {"chunk_method": "seco", "spaco_budget": 8, "chunk_size": 16}
    shared = {"sequence_parallel_size": 2, "per_device_train_batch_size": 2}
    runs = [run(two_ranks, engine, folder, **exact)]
    for first, then in ((exact, {**exact, **shared}), ({**exact, **shared}, exact)):
        shutil.rmtree(folder / "out")
        run(two_ranks, engine, folder, **first)
        again = {"resume_from_checkpoint": folder / "out" / "checkpoint-2"}
        runs.append(run(two_ranks, engine, folder, **then, **again))
    for other in runs[1:]:
        for step in (3, 4):
            assert other[step][:3] == pytest.approx(runs[0][step][:3], rel=1e-4)


@pytest.fixture(scope="module")
def one_rank() -> Iterator[Ranks]:
    ranks = Ranks(1)
    yield ranks
    ranks.stop()


def test_another_number_of_ranks_works_or_is_refused(two_ranks: Ranks, one_rank: Ranks, folder: Path) -> None:
    """With twice the accumulation, one rank sees in a step what two have seen."""
    exact = {"chunk_method": "seco", "spaco_budget": 8}
    whole = run(two_ranks, "fsdp2", folder, **exact)
    again = {"gradient_accumulation_steps": 2, "resume_from_checkpoint": folder / "out" / "checkpoint-2"}
    resumed = run(one_rank, "fsdp2", folder, **exact, **again)
    assert [resumed[step][:3] for step in (3, 4)] == [
        pytest.approx(whole[step][:3], rel=1e-4) for step in (3, 4)
    ]
    shutil.rmtree(folder / "out")
    run(two_ranks, "zero3", folder, **exact)
    refused = arguments_of("zero3", folder, ROWS, **{**OPTIONS, **exact, **again})
    ((status, said),) = one_rank.run(train_in_vain, *refused)
    assert status == 2
    assert "was saved by 2 ranks of DeepSpeed ZeRO, and this job has 1" in said
    assert "ds_to_universal" in said
    other_engine = arguments_of("fsdp2", folder, ROWS, **{**OPTIONS, **exact, "resume_from_checkpoint": True})
    for status, said in two_ranks.run(train_in_vain, *other_engine):
        assert status == 2
        assert not said or "was saved under ZeRO-3, and this job runs under FSDP2" in said


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero2", "zero3"])
def test_the_best_evaluation_is_what_is_saved(two_ranks: Ranks, folder: Path, engine: str) -> None:
    """The first one; the checkpoint that follows is kept to go on from."""
    best = {
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": True,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "dataset_test_split": "train",
        "chunk_method": "seco",
        "spaco_budget": 8,
    }
    first = run(two_ranks, engine, folder, **{**best, "load_best_model_at_end": False, "max_steps": 1})
    expected = loaded(folder, lora=False)
    shutil.rmtree(folder / "out")
    constant = {"lr_scheduler_type": "constant"}
    assert len(first) == 1
    run(two_ranks, engine, folder, **best, **constant, max_steps=3, save_steps=1, save_total_limit=1)
    assert sorted(path.name for path in (folder / "out").glob("checkpoint-*")) == [
        "checkpoint-1",
        "checkpoint-3",
    ]
    for name, value in loaded(folder, lora=False).items():
        assert torch.allclose(value, expected[name], rtol=0, atol=1e-6), name


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero2", "zero3"])
def test_what_is_pushed_and_what_on_save_finds(two_ranks: Ranks, folder: Path, engine: str) -> None:
    """The limit holds, `on_save` finds a whole checkpoint, and one rank pushes whole weights."""
    options = {
        **OPTIONS,
        "max_steps": 2,
        "save_steps": 1,
        "save_total_limit": 1,
        "chunk_method": "seco",
        "spaco_budget": 8,
    }
    options |= {"push_to_hub": True, "hub_model_id": "a/b"}
    options["hub_strategy"] = "end" if engine == "fsdp2" else "all_checkpoints"
    (first, second) = two_ranks.run(train_and_push, *arguments_of(engine, folder, ROWS, **options))
    assert [path.name for path in (folder / "out").glob("checkpoint-*")] == ["checkpoint-2"]
    assert first[0] == second[0] == 0
    assert first[2] == second[2] == [True, True]
    assert second[1] == []
    *during, (where, total) = first[1]
    assert where == ""
    saved = load_file(folder / "out" / "model.safetensors")
    assert total == pytest.approx(sum(float(x.sum()) for x in saved.values()), rel=1e-4)
    expected = [] if engine == "fsdp2" else ["", "checkpoint-1", "", "checkpoint-2"]
    assert [place for place, _ in during] == expected
    assert all(x is not None for _, x in during)
    assert len({x for _, x in during}) == len(expected) // 2


@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3"])
def test_checkpoints_of_weights_alone(two_ranks: Ranks, folder: Path, engine: str) -> None:
    """Of FSDP2: tests/train/options/test_arguments.py."""
    run(two_ranks, engine, folder, max_steps=2, save_only_model=True, chunk_method="seco", spaco_budget=8)
    saved = load_file(folder / "out" / "checkpoint-2" / "model.safetensors")
    for name, value in load_file(folder / "out" / "model.safetensors").items():
        assert torch.equal(value, saved[name]), name


def save_slowly(folder: Path) -> list[str]:
    """Rank 1 is slow to write, and slow to flush: what it finds at both times, and what is listed. Both ranks
    move, as on two machines that share a disk."""
    rank, target, found = distributed.get_rank(), folder / "checkpoint-1", []
    real = checkpoints._flush

    def wait() -> None:
        if rank == 1:
            time.sleep(0.5)
            found.extend(path.name for path in folder.glob("checkpoint-*"))

    def flush(written: Path) -> None:
        wait()
        real(written)

    checkpoints._flush = flush
    try:
        args: Any = SimpleNamespace(local_process_index=0, process_index=rank, world_size=2)
        with checkpoints.whole_checkpoint(target, args, distributed.barrier) as parent:
            wait()
            (parent / target.name).mkdir(parents=True, exist_ok=True)
            (parent / target.name / f"part-{rank}").write_text("part")
    finally:
        checkpoints._flush = real
    return [*found, *json.loads((target / FILE_LIST).read_text())["bytes"]]


def test_a_checkpoint_has_no_name_before_the_slowest_rank_is_done(two_ranks: Ranks, tmp_path: Path) -> None:
    assert two_ranks.run(save_slowly, tmp_path) == [["part-0", "part-1"]] * 2
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_a_rank_without_data_in_the_last_step_stops_nobody(two_ranks: Ranks, folder: Path) -> None:
    """Five samples, two ranks, accumulation of two: the last step has one sample for both."""
    options = {"max_steps": -1, "num_train_epochs": 1, "save_strategy": "no", "long_samples": "truncate"}
    for engine in ("fsdp2", "zero3"):
        arguments = arguments_of(
            engine, folder, ROWS[:5], **{**OPTIONS, **options, "gradient_accumulation_steps": 2}
        )
        assert two_ranks.run(train, *arguments) == [0, 0]
        assert list(figures(folder, "loss")) == [1, 2]
        shutil.rmtree(folder / "out")


def test_zero3_says_which_weights_it_has_no_place_for(one_rank: Ranks, folder: Path) -> None:
    """transformers (5.23) loads them under ZeRO-3 without a report of what is left out."""
    config = json.loads((folder / "model" / "config.json").read_text())
    (folder / "model" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    ((status, said),) = one_rank.run(train_in_vain, *arguments_of("zero3", folder, ROWS, **OPTIONS))
    assert status == 2
    assert "its files hold 9 weight(s) (model.layers.1." in said
    assert not (folder / "out").exists()
    allowed = {"max_steps": 1, "allow_missing_weights": True}
    run(one_rank, "zero3", folder, **allowed)
    assert AutoModelForCausalLM.from_pretrained(folder / "out").config.num_hidden_layers == 1
