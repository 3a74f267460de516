"""Only whole checkpoints of the same engine are resumed from; what is wrong with another is one line."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from chunkdist.train.checkpoints.files import FILE_LIST, fault_of, list_files, num_ranks_of
from chunkdist.train.checkpoints.run_record import RECORD, RunRecord
from chunkdist.train.checkpoints.whole import UNFINISHED, Resumption, delete_older, resumption_of

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


def make(
    folder: Path, engine: str = "ddp", *, listed: bool = True, num_ranks: int = 2, run: str | None = None
) -> Path:
    """Files named as each engine names them (tests/distributed/test_resume.py has real ones)."""
    state = "trainer_state.json", json.dumps({"global_step": 2})
    random = [f"rng_state_{rank}.pth" for rank in range(num_ranks)] if num_ranks > 1 else ["rng_state.pth"]
    named = ((name, "global_step2" if name == "latest" else name) for name in FILES[engine])
    for name, text in (state, *named, *((name, name) for name in (*random, "scheduler.pt"))):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write(folder / name, text)
    if run is not None:
        record(run).write(folder)
    if listed:
        list_files(folder, num_ranks)
    return folder


def write(path: Path, text: str) -> None:
    """A file that an engine without `weights_only` loads is a pickle of its kind."""
    if path.name == ".metadata":
        path.write_bytes(pickle.dumps(Metadata(state_dict_metadata={}, storage_data={})))
    elif path.parent.name.startswith("global_step"):
        torch.save(text, path)
    else:
        path.write_text(text)


def record(run: str, **values: Any) -> RunRecord:
    return RunRecord(run=run, options={}, steps={}, **values)


def resumed(
    option: Any,
    monkeypatch: pytest.MonkeyPatch,
    engine: str = "ddp",
    *,
    out: Path | None = None,
    ranks: int = 2,
) -> Path | None:
    return resumption(option, monkeypatch, engine, out=out, ranks=ranks).checkpoint


def resumption(
    option: Any,
    monkeypatch: pytest.MonkeyPatch,
    engine: str = "ddp",
    *,
    out: Path | None = None,
    ranks: int = 2,
) -> Resumption:
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", str(engine == "fsdp2").lower())
    deepspeed = SimpleNamespace(is_zero3=lambda: engine == "zero3") if engine.startswith("zero") else None
    args: Any = SimpleNamespace(
        resume_from_checkpoint=option, output_dir=out, hf_deepspeed_config=deepspeed, fsdp=None
    )
    return resumption_of(args)


def test_the_last_complete_one_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("checkpoint-2", "checkpoint-10", "checkpoint-30", f"{UNFINISHED}/checkpoint-40"):
        make(tmp_path / name)
    (tmp_path / "checkpoint-30" / "optimizer.pt").unlink()
    assert resumed(True, monkeypatch, out=tmp_path) == tmp_path / "checkpoint-10"
    line = resumption(True, monkeypatch, out=tmp_path).line()
    assert str(line).endswith("checkpoint-10 (passed over: checkpoint-30: optimizer.pt is missing)")
    assert resumed(tmp_path / "checkpoint-2", monkeypatch) == tmp_path / "checkpoint-2"
    for name, reason in (
        ("checkpoint-30", "optimizer.pt is missing"),
        (f"{UNFINISHED}/checkpoint-40", "still being written"),
        ("elsewhere", "it has no trainer_state.json"),
    ):
        with pytest.raises(ValueError, match=rf"is no complete checkpoint: .*{reason}"):
            resumed(tmp_path / name, monkeypatch)
    for empty in (tmp_path / "empty", tmp_path / "checkpoint-2"):
        begun = resumption("true", monkeypatch, out=empty)
        assert begun.checkpoint is None
        assert begun.line() == "resume_from_checkpoint: this run has no checkpoint yet, it begins"
    assert resumption(False, monkeypatch, out=tmp_path).line() is None
    for name in ("checkpoint-2", "checkpoint-10"):
        shutil.rmtree(tmp_path / name)
    with pytest.raises(
        ValueError, match=r"no complete checkpoint of this run \(checkpoint-30: optimizer.pt is missing\)"
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
        content = (whole / name).read_bytes()
        (broken / name).write_bytes(content[:-1])
        assert str(name) in str(fault_of(broken))
        flipped = bytearray(content)
        flipped[len(flipped) // 2] ^= 1
        (broken / name).write_bytes(flipped)
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


def test_a_run_takes_only_its_own_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the highest step of an earlier run in the same folder, nor one that knows no run."""
    for step, run in ((8, "first"), (3, "second"), (5, "second"), (9, None)):
        make(tmp_path / f"checkpoint-{step}", run=run)
    unknown = resumption(True, monkeypatch, out=tmp_path)
    assert unknown.checkpoint == tmp_path / "checkpoint-9"  # the folder names no run
    record("second").write(tmp_path)
    found = resumption(True, monkeypatch, out=tmp_path)
    assert (found.checkpoint, found.run) == (tmp_path / "checkpoint-5", "second")
    assert found.passed_over == ("checkpoint-9 is of another run", "checkpoint-8 is of another run")
    record("third").write(tmp_path)
    found = resumption(True, monkeypatch, out=tmp_path)
    assert (found.checkpoint, found.run, len(found.passed_over)) == (None, None, 4)


def test_a_run_from_an_older_checkpoint_is_another_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the steps of both would be in one folder, under one id; and when it ends before its first
    checkpoint, it begins there again."""
    for step in (2, 4):
        make(tmp_path / f"checkpoint-{step}", run="first")
    record("first").write(tmp_path)
    last, older = tmp_path / "checkpoint-4", tmp_path / "checkpoint-2"
    assert resumption(last, monkeypatch, out=tmp_path).run == "first"
    found = resumption(older, monkeypatch, out=tmp_path)
    assert (found.checkpoint, found.run) == (older, None)
    again = record("unused").going_on(found.checkpoint, found.run)
    assert again.begun_from == str(older)
    again.write(tmp_path)
    found = resumption(True, monkeypatch, out=tmp_path)
    assert (found.checkpoint, found.run) == (older, again.run)


def test_old_checkpoints_of_the_same_run_are_deleted(tmp_path: Path) -> None:
    for step, run in ((1, "own"), (2, "own"), (3, "own"), (4, "own"), (9, "other")):
        make(tmp_path / f"checkpoint-{step}", run=run)
    newest = tmp_path / "checkpoint-4"

    def left() -> list[int]:
        return sorted(int(path.name.split("-")[1]) for path in tmp_path.iterdir())

    delete_older(tmp_path, None, newest=newest, best=None)
    assert left() == [1, 2, 3, 4, 9]
    delete_older(tmp_path, 3, newest=newest, best=str(tmp_path / "checkpoint-1"))
    assert left() == [1, 3, 4, 9]
    delete_older(tmp_path, 1, newest=newest, best=str(tmp_path / "checkpoint-1"))
    assert left() == [1, 4, 9]
    delete_older(tmp_path, 1, newest=newest, best=None)
    assert left() == [4, 9]


class Planted:
    """Makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize(
    ("engine", "name"),
    [
        ("fsdp2", "optimizer_0/.metadata"),
        ("fsdp2", "pytorch_model_fsdp_0/.metadata"),
        ("zero2", "global_step2/mp_rank_00_model_states.pt"),
        ("zero3", "global_step2/zero_pp_rank_1_mp_rank_00_optim_states.pt"),
    ],
)
def test_a_planted_pickle_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str, name: str, listed: bool
) -> None:
    checkpoint = make(tmp_path / "checkpoint-2", engine, listed=False)
    path, ran = checkpoint / name, tmp_path / "ran"
    if name.endswith(".metadata"):
        path.write_bytes(pickle.dumps([Planted(ran)]))
    else:
        torch.save({"module": Planted(ran)}, path)
    if listed:
        list_files(checkpoint, 2)  # whoever plants a pickle writes its checksum, too
    with pytest.raises(ValueError, match=rf"{name} holds posix.mkdir, which no checkpoint of this engine"):
        resumed(checkpoint, monkeypatch, engine)
    assert not ran.exists()
    path.write_bytes(b"no pickle")
    if listed:
        list_files(checkpoint, 2)
    with pytest.raises(ValueError, match=name):
        resumed(checkpoint, monkeypatch, engine)


def test_a_planted_value_beside_fsdp2s_tensors_does_not_run(tmp_path: Path) -> None:
    """The metadata is as it should be; torch loads what it points to as a pickle, too."""
    checkpoint, ran = make(tmp_path / "checkpoint-2", "fsdp2", listed=False), tmp_path / "ran"
    folder = checkpoint / "optimizer_0"

    def plant(value: Any, file: str = "__0_0.distcp", **place: Any) -> str | None:
        torch.save(value, checkpoint / "value")
        content = (checkpoint / "value").read_bytes()
        (folder / "__0_0.distcp").write_bytes(b"before" + content)
        where = _StorageInfo(relative_path=file, offset=6, length=len(content), **place)
        metadata = Metadata(
            state_dict_metadata={"lr": BytesStorageMetadata()}, storage_data={MetadataIndex("lr"): where}
        )
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))
        return fault_of(checkpoint)

    assert plant(0.1) is None
    assert "optimizer_0/.metadata holds posix.mkdir, which" in str(plant(Planted(ran)))
    assert "a value of ../elsewhere" in str(plant(0.1, file="../elsewhere"))
    assert "a value of __0_0.distcp" in str(plant(0.1, transform_descriptors=["zstd"]))
    assert not ran.exists()


def test_a_folder_elsewhere_and_files_that_were_not_saved_are_faults(tmp_path: Path) -> None:
    zero = make(tmp_path / "zero", "zero2", listed=False)
    for text in ("../elsewhere", "/elsewhere", "global_step2/../.."):
        (zero / "latest").write_text(text)
        assert "latest names no global_step folder" in str(fault_of(zero))
    (zero / "latest").write_text("global_step2")
    assert fault_of(zero) is None
    one = make(tmp_path / "one")
    (one / "notes.txt").write_text("allowed")
    assert fault_of(one) is None
    (one / "pytorch_model.bin").write_text("planted")
    assert fault_of(one) == "pytorch_model.bin is not one of the files that were saved"


def test_a_list_of_an_earlier_version_has_sizes_only(tmp_path: Path) -> None:
    checkpoint = make(tmp_path / "checkpoint-2")
    listed = json.loads((checkpoint / FILE_LIST).read_text())
    assert set(listed["xxh3"]) == set(listed["bytes"])
    del listed["xxh3"]
    (checkpoint / FILE_LIST).write_text(json.dumps(listed))
    assert fault_of(checkpoint) is None
    assert not (checkpoint / RECORD).exists()
