"""A training run of a second: a model of 2 layers, 16 wide, on bytes, and the options that go with it."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[2]
BYTE_LLAMA = ROOT / "configs" / "models" / "byte-llama"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<' + message.role + '>' }}"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content + eos_token }}{% endgeneration %}"
    "{% else %}{{ message.content }}{% endif %}{% endfor %}"
)
USER, ASSISTANT = {"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi there"}
TEXTS = [{"text": "def f():\n    return 1\n" * count} for count in (1, 2, 7, 3)]


def load_script(path: Path) -> ModuleType:
    """A file that is no module of a package, as one."""
    spec = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def make_model_folder(folder: Path, **config_values: Any) -> Path:
    """The byte-level model without weights, made tiny."""
    shutil.copytree(BYTE_LLAMA, folder)
    config = json.loads((folder / "config.json").read_text())
    config.update(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    config.update(config_values)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def command_line(model: Path, rows: list[dict[str, Any]], **values: Any) -> list[str]:
    """Options to train the model in `model` on `rows`, into `out` beside it."""
    given: dict[str, Any] = {
        "model_name_or_path": model,
        "dataset_name": write_rows(model.parent / "data.jsonl", rows),
        "output_dir": model.parent / "out",
        "max_length": 64,
        "chunk_size": 16,
        "bf16": False,
        "use_cpu": True,
        "max_steps": 2,
        "per_device_train_batch_size": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "learning_rate": 1e-2,
        **values,
    }
    if not (model / "model.safetensors").exists():
        given.setdefault("from_scratch", True)
    return [
        part
        for key, value in given.items()
        for part in (f"--{key}", *map(str, value if isinstance(value, list) else [value]))
    ]
