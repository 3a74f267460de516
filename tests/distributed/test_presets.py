"""Every preset trains as one process with all the data does, and both bf16 engines give the same losses."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.distributed.launched import (
    arguments_of,
    figures,
    load_launcher,
    master_dtypes,
    save_initial_model,
    train,
)
from tests.distributed.ranks import Ranks
from tests.helpers.tiny_run import TEXTS, command_line, make_model_folder

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")

PRESETS = ("ddp", "fsdp2", "fsdp2-offload", "zero1", "zero2", "zero3", "zero3-offload")
ROWS = TEXTS * 4
Outcome = tuple[dict[int, tuple[float, ...]], dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """One process, without chunks and from scratch, whose batch holds what two ranks get: with other numbers
    of supervised tokens, so that only a loss divided by those of all ranks is the same."""
    folder = tmp_path_factory.mktemp("presets")
    model = make_model_folder(folder / "model")
    options: dict[str, Any] = {"max_steps": 3, "long_samples": "split", "report_to": "none", "data_seed": 3}
    arguments = command_line(model, ROWS, chunk_method="none", per_device_train_batch_size=2, **options)
    assert load_launcher().main(arguments) == 0
    return outcome(folder)


def outcome(folder: Path) -> Outcome:
    return figures(folder, "loss"), dict(AutoModelForCausalLM.from_pretrained(folder / "out").state_dict())


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_trains_as_one_process_does(
    two_ranks: Ranks, tmp_path: Path, expected: Outcome, preset: str
) -> None:
    make_model_folder(tmp_path / "model")
    assert two_ranks.run(train, *arguments_of(preset, tmp_path, ROWS, max_steps=3)) == [0, 0]
    losses, weights = outcome(tmp_path)
    assert losses.keys() == expected[0].keys() == {1, 2, 3}
    for step, loss in losses.items():
        assert loss == pytest.approx(expected[0][step], rel=1e-4)
    for name, value in expected[1].items():
        torch.testing.assert_close(weights[name].float(), value.float(), rtol=0, atol=5e-4)


def test_fsdp2_and_zero3_have_the_same_losses_in_bf16_with_fp32_masters(
    two_ranks: Ranks, tmp_path: Path
) -> None:
    save_initial_model(make_model_folder(tmp_path / "model"), dtype=torch.bfloat16)
    losses = {}
    for engine in ("fsdp2", "zero3"):
        arguments = arguments_of(engine, tmp_path, ROWS, max_steps=4, bf16=True, dtype="float32")
        for dtypes in two_ranks.run(master_dtypes, *arguments):
            assert dtypes == {"torch.float32"}
        losses[engine] = [loss for (loss,) in figures(tmp_path, "loss").values()]
        shutil.rmtree(tmp_path / "out")
    assert len(losses["fsdp2"]) == 4
    assert losses["fsdp2"] == pytest.approx(losses["zero3"], rel=5e-3)
