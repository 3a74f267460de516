"""Settings under which ranks would wait for ever, or nothing could be saved, are refused before training."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from chunkdist import ChunkConfig, chunk_model, unchunk_model
from chunkdist.integrations.checkpoints import UNFINISHED, checkpoint_to_resume
from chunkdist.sharding.launch import check_engine
from tests.models import tiny_llama


def arguments(*, gathers: bool = True, even: bool = True, drops: bool = False) -> Any:
    deepspeed = SimpleNamespace(is_zero3=lambda: True, get_value=lambda name: gathers)
    return SimpleNamespace(
        hf_deepspeed_config=deepspeed,
        accelerator_config=SimpleNamespace(even_batches=even),
        dataloader_drop_last=drops,
    )


def test_zero3_must_be_able_to_save() -> None:
    check_engine(arguments())
    with pytest.raises(ValueError, match=r"stage3_gather_16bit_weights.*zero_optimization\.stage=3"):
        check_engine(arguments(gathers=False))


def test_ranks_have_the_same_number_of_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    check_engine(arguments(even=False))
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_engine(arguments(even=False, drops=True))
    with pytest.raises(ValueError, match="even_batches=False with 2 ranks and dataloader_drop_last=False"):
        check_engine(arguments(even=False))


def test_layers_are_marked_as_leaves_before_deepspeed_is_imported() -> None:
    model = chunk_model(tiny_llama(), ChunkConfig(chunk_size=4))
    assert all(layer._z3_leaf for layer in model.model.layers)
    unchunk_model(model)
    assert not any(hasattr(layer, "_z3_leaf") for layer in model.model.layers)


def test_only_complete_checkpoints_are_resumed(tmp_path: Path) -> None:
    for name in ("checkpoint-2", "checkpoint-10", "checkpoint-30", f"{UNFINISHED}/checkpoint-40"):
        (tmp_path / name).mkdir(parents=True)
        if name != "checkpoint-30":
            (tmp_path / name / "trainer_state.json").touch()
    assert checkpoint_to_resume(True, str(tmp_path), 1) == tmp_path / "checkpoint-10"
    assert checkpoint_to_resume(str(tmp_path / "checkpoint-2"), None, 1) == tmp_path / "checkpoint-2"
    for name in ("checkpoint-30", f"{UNFINISHED}/checkpoint-40", "elsewhere"):
        with pytest.raises(ValueError, match="is no complete checkpoint"):
            checkpoint_to_resume(str(tmp_path / name), str(tmp_path), 1)
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        checkpoint_to_resume("true", str(tmp_path / "empty"), 1)
