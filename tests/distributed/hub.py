"""A run that pushes to a Hub that only notes what it is given."""

from __future__ import annotations

import json
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from safetensors.torch import load_file
from transformers import trainer
from transformers.trainer_callback import CallbackHandler

from chunkdist.train.checkpoints.files import FILE_LIST
from tests.distributed.launched import train


class Hub:
    """Stands in for `huggingface_hub.HfApi`: of each upload, where it goes, and a number of its weights."""

    def __init__(self) -> None:
        self.uploads: list[tuple[str, float | None]] = []

    def create_repo(self, name: str, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(repo_id=name)

    def upload_folder(self, *, folder_path: str, path_in_repo: str = "", **_: Any) -> Future[None]:
        weights = Path(folder_path) / "model.safetensors"
        total = sum(float(x.sum()) for x in load_file(weights).values()) if weights.exists() else None
        self.uploads.append((path_in_repo, total))
        done: Future[None] = Future()
        done.set_result(None)
        return done


def train_and_push(
    engine: str, arguments: list[str]
) -> tuple[int, list[tuple[str, float | None]], list[bool]]:
    """As `train`; with the uploads of this rank, and whether each `on_save` found a whole checkpoint."""
    hub, found = Hub(), []
    real, on_save = trainer.hf_api, CallbackHandler.on_save

    def noted(self: Any, args: Any, state: Any, control: Any) -> Any:
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        listed = json.loads((checkpoint / FILE_LIST).read_text())["bytes"]
        found.append(all((checkpoint / name).stat().st_size == size for name, size in listed.items()))
        return on_save(self, args, state, control)

    trainer.hf_api, CallbackHandler.on_save = lambda: hub, noted
    try:
        return train(engine, arguments), hub.uploads, found
    finally:
        trainer.hf_api, CallbackHandler.on_save = real, on_save
