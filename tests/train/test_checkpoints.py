"""Only whole checkpoints of the same engine are resumed from; what is wrong with another is one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from chunkdist.train.checkpoint_files import FILE_LIST, fault_of, list_files, num_ranks_of
from chunkdist.train.checkpoints import UNFINISHED, checkpoint_to_resume, resume_line

FILES = {
    "ddp": ("optimizer.pt", "model.safetensors"),
    "fsdp2": (
        *(f"{part}/__{rank}_0.distcp" for part in ("optimizer_0", "pytorch_model_fsdp_0") for rank in (0, 1)),
        "optimizer_0/.metadata",
        "pytorch_model_fsdp_0/.metadata",
    ),
    "zero2": (
        *(f"global_step2/bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (0, 1)),
        "global_step2/mp_rank_00_model_states.pt",
        "latest",
    ),
    "zero3": (
        *(f"global_step2/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (0, 1)),
        *(f"global_step2/zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in (0, 1)),
        "latest",
    ),
}
NAMES = {"ddp": "DDP or one process", "fsdp2": "FSDP2", "zero2": "ZeRO-1 or ZeRO-2", "zero3": "ZeRO-3"}


def make(folder: Path, engine: str = "ddp", *, listed: bool = True, num_ranks: int = 2) -> Path:
    """Files named as each engine names them (tests/distributed/test_resume.py has real ones)."""
    state = "trainer_state.json", json.dumps({"global_step": 2})
    random = [f"rng_state_{rank}.pth" for rank in range(num_ranks)] if num_ranks > 1 else ["rng_state.pth"]
    for name, text in (state, *((name, name) for name in (*FILES[engine], *random, "scheduler.pt"))):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    if listed:
        list_files(folder, num_ranks)
    return folder


def resumed(
    option: Any,
    monkeypatch: pytest.MonkeyPatch,
    engine: str = "ddp",
    *,
    out: Path | None = None,
    ranks: int = 2,
) -> Path | None:
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", str(engine == "fsdp2").lower())
    deepspeed = SimpleNamespace(is_zero3=lambda: engine == "zero3") if engine.startswith("zero") else None
    args: Any = SimpleNamespace(
        resume_from_checkpoint=option, output_dir=out, hf_deepspeed_config=deepspeed, fsdp=None
    )
    return checkpoint_to_resume(args)


def test_the_last_complete_one_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("checkpoint-2", "checkpoint-10", "checkpoint-30", f"{UNFINISHED}/checkpoint-40"):
        make(tmp_path / name)
    (tmp_path / "checkpoint-30" / "optimizer.pt").unlink()
    assert resumed(True, monkeypatch, out=tmp_path) == tmp_path / "checkpoint-10"
    assert resume_line(tmp_path / "checkpoint-10").endswith(
        "checkpoint-10 (newer, but not complete: checkpoint-30: optimizer.pt is missing)"
    )
    assert resumed(tmp_path / "checkpoint-2", monkeypatch) == tmp_path / "checkpoint-2"
    for name, reason in (
        ("checkpoint-30", "optimizer.pt is missing"),
        (f"{UNFINISHED}/checkpoint-40", "still being written"),
        ("elsewhere", "it has no trainer_state.json"),
    ):
        with pytest.raises(ValueError, match=rf"is no complete checkpoint: .*{reason}"):
            resumed(tmp_path / name, monkeypatch)
    with pytest.raises(ValueError, match="holds no complete checkpoint: leave"):
        resumed("true", monkeypatch, out=tmp_path / "empty")
    for name in ("checkpoint-2", "checkpoint-10"):
        shutil.rmtree(tmp_path / name)
    with pytest.raises(
        ValueError, match=r"no complete checkpoint \(checkpoint-30: optimizer.pt is missing\)"
    ):
        resumed("true", monkeypatch, out=tmp_path)


@pytest.mark.parametrize("engine", FILES)
def test_every_file_is_needed(tmp_path: Path, engine: str) -> None:
    whole = make(tmp_path / "whole", engine)
    assert fault_of(whole) is None
    files = [
        path.relative_to(whole) for path in whole.rglob("*") if path.is_file() and path.name != FILE_LIST
    ]
    assert len(files) == len(FILES[engine]) + 4
    for name in files:
        broken = shutil.copytree(whole, tmp_path / "broken")
        (broken / name).unlink()
        assert str(name) in str(fault_of(broken))
        (broken / name).write_text((whole / name).read_text()[:-1])
        assert str(name) in str(fault_of(broken))
        shutil.rmtree(broken)


@pytest.mark.parametrize(
    ("engine", "file", "reason"),
    [
        ("ddp", "optimizer.pt", r"no optimizer state \(saved with save_only_model: true\?\)"),
        ("fsdp2", "optimizer_0/.metadata", "no optimizer state"),
        ("fsdp2", "pytorch_model_fsdp_0", "it has no pytorch_model_fsdp_0"),
        ("ddp", "scheduler.pt", "it has no scheduler.pt"),
        ("ddp", "rng_state_0.pth", "rng_state_0.pth is missing"),
        ("ddp", "rng_state_1.pth", "rng_state_1.pth is missing"),
        (
            "zero2",
            "global_step2/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt",
            "optim_states file of rank 1",
        ),
        ("zero3", "global_step2/zero_pp_rank_0_mp_rank_00_optim_states.pt", "optim_states file of rank 0"),
    ],
)
def test_of_other_programs_checkpoints_what_is_needed_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str, file: str, reason: str
) -> None:
    checkpoint = make(tmp_path / "checkpoint-2", engine, listed=False)
    assert resumed(checkpoint, monkeypatch, engine) == checkpoint
    shutil.rmtree(checkpoint / file) if (checkpoint / file).is_dir() else (checkpoint / file).unlink()
    with pytest.raises(ValueError, match=reason):
        resumed(checkpoint, monkeypatch, engine)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
@pytest.mark.parametrize("name", ["trainer_state.json", FILE_LIST])
def test_a_broken_file_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str
) -> None:
    checkpoint = make(tmp_path / "checkpoint-2", listed=name == FILE_LIST)
    (checkpoint / name).write_text(text)
    with pytest.raises(ValueError, match=rf"is no complete checkpoint: {checkpoint / name}"):
        resumed(checkpoint, monkeypatch)


def test_one_process_resumes_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for listed in (True, False):
        checkpoint = make(tmp_path / f"checkpoint-{listed:d}", num_ranks=1, listed=listed)
        assert resumed(checkpoint, monkeypatch, ranks=1) == checkpoint
        assert num_ranks_of(checkpoint) == 1


@pytest.mark.parametrize("saved", FILES)
@pytest.mark.parametrize("now", FILES)
def test_another_engine_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved: str, now: str
) -> None:
    checkpoint = make(tmp_path / "checkpoint-2", saved)
    if saved == now:
        assert resumed(checkpoint, monkeypatch, now) == checkpoint
        return
    with pytest.raises(
        ValueError, match=f"saved under {NAMES[saved]}, and this job runs under {NAMES[now]},"
    ):
        resumed(checkpoint, monkeypatch, now)


def test_another_number_of_zero_ranks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the folder of a conversion that was begun beside the one that it reads."""
    checkpoint = make(tmp_path / "checkpoint-2", "zero2")
    (checkpoint / "global_step2_universal").mkdir()
    with pytest.raises(
        ValueError, match=rf"by 2 ranks of .*--input_folder {checkpoint}/global_step2 --output"
    ):
        resumed(checkpoint, monkeypatch, "zero2", ranks=4)
    (checkpoint / "latest_universal").write_text("global_step2_universal")
    assert resumed(checkpoint, monkeypatch, "zero2", ranks=4) == checkpoint
