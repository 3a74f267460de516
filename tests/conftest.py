"""What every test needs: nothing from the network, one thread a process, and no GPU test without a GPU."""

from __future__ import annotations

import os

# Before torch, transformers and deepspeed are imported: they read these once. Subprocesses inherit them.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_DATASETS_DISABLE_PROGRESS_BARS="1",
    TOKENIZERS_PARALLELISM="false",
    WANDB_MODE="disabled",
    MPLBACKEND="Agg",
)
os.environ.setdefault("OMP_NUM_THREADS", "1")

import signal
from pathlib import Path

import pytest
import torch

from tests.helpers.tiny_run import make_model_folder

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


# A shell that runs the tests in the background has told them, and all that they start, to ignore SIGINT.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _private_caches(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Datasets that tests read leave nothing in the user's cache."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


@pytest.fixture
def tiny_model(tmp_path: Path) -> Path:
    """A folder with the config and the tokenizer of a byte-level Llama of 2 layers."""
    return make_model_folder(tmp_path / "model")
