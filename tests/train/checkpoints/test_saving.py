"""A model is saved whole or not at all, and a full disk is one clear line."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from chunkdist.train.checkpoints.saving import DiskFullError, is_disk_full, removed_if_empty, whole_or_absent


def write(folder: Path, error: BaseException | None = None) -> None:
    with whole_or_absent(folder, what="model", is_writer=True):
        folder.mkdir(exist_ok=True)
        (folder / "part").touch()
        if error:
            raise error


def test_what_is_written_stays(tmp_path: Path) -> None:
    write(tmp_path / "new")
    assert (tmp_path / "new" / "part").exists()


@pytest.mark.parametrize("error", [ValueError("other"), KeyboardInterrupt(), OSError(errno.EIO, "broken")])
def test_a_failure_takes_the_half_written_away_and_goes_on(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)) as caught:
        write(tmp_path / "new", error)
    assert caught.value is error
    assert not (tmp_path / "new").exists()


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    with pytest.raises(DiskFullError, match="no space left to save the model, nothing half-written was kept"):
        write(tmp_path / "new", OSError(errno.ENOSPC, "No space left on device"))
    assert not (tmp_path / "new").exists()


def test_a_folder_that_was_there_is_not_taken_away(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    with pytest.raises(ValueError, match="other"):
        write(tmp_path / "old", ValueError("other"))
    assert (tmp_path / "old" / "part").exists()


def test_which_errors_mean_a_full_disk() -> None:
    safetensors = RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert is_disk_full(OSError(errno.EDQUOT, "quota"))
    assert is_disk_full(safetensors)
    later = ValueError("later")
    later.__cause__ = safetensors
    assert is_disk_full(later)
    assert not is_disk_full(OSError(errno.EACCES, "no"))
    assert not is_disk_full(None)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
@pytest.mark.parametrize("num_values", [4, 1000])
def test_torch_on_a_full_disk(num_values: int) -> None:
    """Its writer fails when it is closed, with a message of its own."""
    with pytest.raises(RuntimeError) as refused:
        torch.save(torch.ones(num_values), "/dev/full")
    assert is_disk_full(RuntimeError(str(refused.value)))  # alone, as another process would tell it


def test_folders_made_for_nothing_are_taken_away(tmp_path: Path) -> None:
    def fail_in(folder: Path, *, file: bool) -> None:
        with removed_if_empty(folder):
            os.makedirs(folder, exist_ok=True)
            if file:
                (folder / "kept").touch()
            raise ValueError("refused")

    with pytest.raises(ValueError, match="refused"):
        fail_in(tmp_path / "runs" / "one", file=False)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="refused"):
        fail_in(tmp_path / "runs" / "two", file=True)
    assert (tmp_path / "runs" / "two" / "kept").exists()
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="refused"):
        fail_in(tmp_path / "there", file=False)
    assert (tmp_path / "there").exists()
