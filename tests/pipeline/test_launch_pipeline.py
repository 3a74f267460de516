"""`launchers/train.py` with `pipeline_stages`: losses of one process, files that load, runs that go on."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from chunkdist.pipeline.plan import CHUNK_SIZES
from chunkdist.train.trainers.pipeline import _refuse_tied_copies
from tests.distributed.launched import save_initial_model
from tests.distributed.ranks import Ranks
from tests.helpers.models import tiny_llama
from tests.helpers.position_tables import check_sums
from tests.helpers.tiny_run import TEXTS, make_model_folder
from tests.pipeline.launched_pipeline import (
    Failure,
    arguments_of,
    launch,
    launch_and_choose,
    launch_and_fail,
    launch_and_watch,
    log_history,
    records,
)
from tests.pipeline.planted import errors_in_cells

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")

ROWS = TEXTS * 3
OPTIONS: dict[str, Any] = {
    "max_steps": 4,
    "save_strategy": "steps",
    "save_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "dataset_test_split": "train",
    "per_device_eval_batch_size": 1,
    "lr_scheduler_type": "linear",
    "max_grad_norm": 0.5,
    "chunk_check": False,
    "seed": 5,
}
LORA = {"use_peft": True, "lora_target_modules": "all-linear", "lora_dropout": 0.0}
RUNS: list[tuple[int, dict[str, Any]]] = [
    (2, {"pipeline_stages": 2}),
    (2, {"pipeline_stages": 2, **LORA}),
    (4, {"pipeline_stages": 2, "pipeline_shard_weights": True}),
]
"""Ranks and options of runs that are compared with one process and resumed: what docs/support.md says."""
FIGURES = ("loss", "grad_norm", "learning_rate", "num_tokens_seen")


@pytest.fixture(scope="module")
def one_rank() -> Iterator[Ranks]:
    ranks = Ranks(1)
    yield ranks
    ranks.stop()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_model_folder(tmp_path_factory.mktemp("pipeline") / "model", num_hidden_layers=3)
    save_initial_model(folder)
    return folder


def folder_of(model: Path, folder: Path) -> Path:
    folder.mkdir()
    shutil.copytree(model, folder / "model")
    return folder


def run(ranks: Ranks, folder: Path, **options: Any) -> list[tuple[float, ...]]:
    given = {"per_device_train_batch_size": 4 // ranks.num_ranks, **OPTIONS, **options}
    for status, said in ranks.run(launch, arguments_of(folder, ROWS, **given)):
        assert status == 0, said
    trained = [row for row in records(folder) if "loss" in row]
    for row in trained:
        check_sums(row)
    return [tuple(row[name] for name in FIGURES) for row in trained]


def losses_of_evaluations(folder: Path) -> list[float]:
    found = [row["eval_loss"] for row in log_history(folder) if "eval_loss" in row]
    assert len(found) == 2
    return found


def weights(folder: Path, *, lora: bool = False) -> dict[str, torch.Tensor]:
    kind = AutoPeftModelForCausalLM if lora else AutoModelForCausalLM
    return dict(kind.from_pretrained(folder / "out").state_dict())


@pytest.mark.parametrize("options", [options for ranks, options in RUNS if ranks == 2], ids=["full", "LoRA"])
def test_two_stages_train_as_one_process_and_go_on_from_a_checkpoint(
    model: Path, tmp_path: Path, one_rank: Ranks, two_ranks: Ranks, options: dict[str, Any]
) -> None:
    alone, piped = folder_of(model, tmp_path / "alone"), folder_of(model, tmp_path / "piped")
    expected = run(one_rank, alone, **{**options, "pipeline_stages": 1})
    found = run(two_ranks, piped, **options)
    assert len(expected) == 4
    for mine, theirs in zip(found, expected, strict=True):
        assert mine == pytest.approx(theirs, rel=2e-4)
    assert losses_of_evaluations(piped) == pytest.approx(losses_of_evaluations(alone), rel=1e-5)
    logged = [row for row in log_history(piped) if "loss" in row]
    assert [tuple(row[name] for name in FIGURES) for row in logged] == found
    lora = "use_peft" in options
    whole, trained = weights(alone, lora=lora), weights(piped, lora=lora)
    assert whole.keys() == trained.keys()
    for name, x in whole.items():
        torch.testing.assert_close(trained[name], x, rtol=1e-3, atol=1e-4, msg=name)
    shutil.rmtree(piped / "out" / "checkpoint-4")
    assert run(two_ranks, piped, resume_from_checkpoint=True, **options) == found
    for name, x in weights(piped, lora=lora).items():
        assert torch.equal(x, trained[name]), name


def test_replicas_share_weights_and_go_on(
    model: Path, tmp_path: Path, one_rank: Ranks, four_ranks: Ranks
) -> None:
    alone, piped = folder_of(model, tmp_path / "alone"), folder_of(model, tmp_path / "piped")
    ((_, options),) = (given for given in RUNS if given[0] == 4)
    expected, found = run(one_rank, alone), run(four_ranks, piped, **options)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine == pytest.approx(theirs, rel=2e-4)
    assert losses_of_evaluations(piped) == pytest.approx(losses_of_evaluations(alone), rel=1e-5)
    trained = weights(piped)
    shutil.rmtree(piped / "out" / "checkpoint-4")
    assert run(four_ranks, piped, resume_from_checkpoint=True, **options) == found
    for name, x in weights(piped).items():
        assert torch.equal(x, trained[name]), name


def test_only_a_stage_goes_to_a_device(model: Path, tmp_path: Path, two_ranks: Ranks) -> None:
    folder = folder_of(model, tmp_path / "moved")
    options = {"max_steps": 1, "chunk_check": True, "pipeline_stages": 2}
    whole = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(folder / "model").parameters())
    for moved in two_ranks.run(launch_and_watch, arguments_of(folder, ROWS, **options)):
        assert len(moved) == 1
        assert 0 < moved[0] < whole


def test_what_is_auto_is_chosen_alike_on_all_ranks(model: Path, tmp_path: Path, two_ranks: Ranks) -> None:
    """And trains as one process does."""
    folder = folder_of(model, tmp_path / "auto")
    auto = {"chunk_size": "auto", "retained_chunks": "auto", "pipeline_forwards_ahead": "auto"}
    options = {"max_steps": 1, "pipeline_stages": 2, "max_length": 1500, **auto}
    rows = [{"text": "x = 1\n" * count} for count in (250, 100, 90, 80, 3, 2, 1, 1)]
    arguments = arguments_of(folder, rows, **options, per_device_train_batch_size=4)
    (first, table), (second, nothing) = two_ranks.run(launch_and_choose, arguments)
    assert first == second
    assert first.chunk_size in CHUNK_SIZES
    assert [list(stage) for stage in first.stages] == [[0, 1], [2]]
    assert nothing == ""
    for line in ("stages", "chunk size", "retained chunks", "forwards ahead", "graphs at a time", "bubble"):
        assert f" {line} " in table
    assert table.count("auto: the least") == 3
    assert f"{first.bubble_share:.1%}, reruns {first.rerun_share:.1%}" in table


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"pipeline_stages": 3}, "pipeline_stages=3 with 2 rank(s): start a multiple of 3"),
        ({"pipeline_stages": 0}, "pipeline_stages=0: write 1 or more"),
        ({"chunk_method": "spaco"}, "chunk_method=spaco with pipeline_stages=2: a pipeline backpropagates"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps=2 with pipeline_stages=2: a step"),
        ({"chunk_packing": True}, "chunk_packing=True with pipeline_stages=2: sequences share chunks"),
        ({"pipeline_shard_weights": True}, "pipeline_shard_weights=True with 2 ranks in 2 stages"),
        (
            {"pipeline_stages": 1, "pipeline_forwards_ahead": 2},
            "pipeline_forwards_ahead=2 with pipeline_stages=1",
        ),
        ({"pipeline_forwards_ahead": "0"}, "pipeline_forwards_ahead=0: write at least 1, or auto"),
        ({"chunk_offload": "auto"}, "chunk_offload=auto with pipeline_stages=2: a stage keeps K/V"),
        ({"bf16_full_eval": True}, "bf16_full_eval=True with pipeline_stages=2"),
        ({"eval_packing": True}, "eval_packing=True with pipeline_stages=2"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 with pipeline_stages=2"),
        ({"loss_type": "dft"}, "loss_type=dft with pipeline_stages=2"),
    ],
    ids=str,
)
def test_options_that_exclude_a_pipeline_are_one_line(
    model: Path, tmp_path: Path, two_ranks: Ranks, options: dict[str, Any], said: str
) -> None:
    folder = folder_of(model, tmp_path / "refused")
    arguments = arguments_of(folder, ROWS, **{**OPTIONS, "pipeline_stages": 2, **options})
    (status, lines), _ = two_ranks.run(launch, arguments)
    assert status == 2
    assert lines.splitlines()[-1].startswith(f"chunkdist: {said}")
    assert not (folder / "out").exists()


def test_errors_inside_a_cell_stay_what_they_are(one_rank: Ranks) -> None:
    (said,) = one_rank.run(errors_in_cells)
    assert said == {
        name: f"PlantedError: in the {name} from KeyError('why')" for name in ("forward", "backward")
    }


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ("raises", "rank 1 (stage 1 of replica 0) failed: ArithmeticError: planted"),
        ("is killed", "rank 1 (stage 1 of replica 0) is gone"),
        ("hangs", "rank 1 (stage 1 of replica 0) did not come to a collective within the timeout"),
    ],
)
def test_a_stage_that_fails_ends_the_others_and_is_named(
    model: Path, tmp_path: Path, how: Failure, named: str
) -> None:
    ranks = Ranks(2, may_die=(1,))
    try:
        folder = folder_of(model, tmp_path / "failed")
        options = {**OPTIONS, "pipeline_stages": 2, "save_strategy": "no", "eval_strategy": "no"}
        arguments = arguments_of(folder, ROWS, **options, ddp_timeout=4)
        (said, seconds), died = ranks.run(launch_and_fail, how, arguments)
    finally:
        ranks.stop()
    assert died is None
    assert f"chunkdist: {named}" in said
    assert seconds < 15


def test_adapters_that_could_not_be_loaded_again_are_refused() -> None:
    for names, tied, refused in (
        (["embed_tokens", "lm_head"], True, True),
        (["embed_tokens", "lm_head"], False, False),
        (None, True, False),
    ):
        config = LoraConfig(target_modules=["q_proj"], modules_to_save=names, task_type="CAUSAL_LM")
        model = get_peft_model(tiny_llama(tie_word_embeddings=tied), config)
        with pytest.raises(ValueError, match="tied to the embeddings") if refused else nullcontext():
            _refuse_tied_copies(model)
