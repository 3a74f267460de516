"""What would lose a trained model at its end is refused before training, in one line, and nothing is left
behind."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.trainer_utils import HubStrategy

from chunkdist.train.build import build_trainer
from chunkdist.train.checkpoints.save_check import check_saving
from chunkdist.train.checkpoints.saving import save_model
from chunkdist.train.options.arguments import parse_options
from tests.helpers.tiny_run import TEXTS, command_line, make_model_folder


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    model = make_model_folder(tmp_path_factory.mktemp("save") / "model")
    options = parse_options(command_line(model, TEXTS[:2], report_to="none", save_strategy="steps"))
    return build_trainer(options)[0]


@pytest.fixture
def out(trainer: Any, tmp_path: Path) -> Path:
    trainer.args.output_dir = str(tmp_path / "out")
    trainer.args.save_strategy = "steps"
    return tmp_path / "out"


def refused(trainer: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        check_saving(trainer, "elsewhere")


def test_a_trial_leaves_nothing(trainer: Any, out: Path) -> None:
    assert check_saving(trainer, "elsewhere") == []
    assert list(out.iterdir()) == []
    (out / "config.json").write_text("of an earlier run")
    assert check_saving(trainer, "elsewhere") == []
    assert [path.read_text() for path in out.iterdir()] == ["of an earlier run"]


def folder(path: Path) -> None:
    (path / "inside").mkdir(parents=True)


def file(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("")


def link(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to("nowhere")


@pytest.mark.parametrize(
    ("name", "make", "said"),
    [
        ("model.safetensors", folder, "is a folder, and a file of that name is to be saved"),
        ("model.safetensors.index.json", folder, "is a folder, and a file of that name is to be saved"),
        ("config.json", folder, "is a folder, and a file of that name is to be saved"),
        ("tokenizer.json", folder, "is a folder, and a file of that name is to be saved"),
        ("chunkdist_run.json", folder, "is a folder, and a file of that name is to be saved"),
        ("checkpoint-4", file, "is no folder, and a checkpoint may get that name"),
        ("checkpoint-4", link, "is no folder, and a checkpoint may get that name"),
        (".unfinished-model", file, "is in the way of what is being saved"),
        (".unfinished-checkpoint", link, "is in the way of what is being saved"),
        ("adapter_config.json", file, "holds the adapter of an earlier run .*would put the adapter on it"),
    ],
)
def test_what_is_in_the_way_is_named(
    trainer: Any, out: Path, name: str, make: Callable[[Path], None], said: str
) -> None:
    make(out / name)
    refused(trainer, said)
    assert [path.name for path in out.iterdir()] == [name]


def test_a_folder_that_cannot_be_written_is_named(
    trainer: Any, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link(out)
    refused(trainer, "cannot be written: File exists")
    out.unlink()
    file(out)
    refused(trainer, "cannot be written")
    trainer.args.output_dir = str(tmp_path / ("x" * 300))
    refused(trainer, "cannot be written: File name too long")
    below = ["y"] * (4000 - len(str(tmp_path)) - 1)
    below[100:-1:101] = "/" * len(below[100:-1:101])  # names of 100 letters
    deep = tmp_path / "".join(below)
    assert len(str(deep)) == 4000
    trainer.args.output_dir = str(deep)  # it can be made, but no checkpoint in it
    refused(trainer, "cannot be written: File name too long")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    out.unlink()
    trainer.args.output_dir = str(out)
    for number in (errno.EACCES, errno.EROFS):

        def fail(self: Path, *given: Any, number: int = number) -> int:
            raise OSError(number, os.strerror(number), str(self))

        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_bytes", fail)
            refused(trainer, f"cannot be written: {os.strerror(number)}")
    assert not out.exists()


def test_the_models_own_folder_is_refused(trainer: Any, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    trainer.args.output_dir = str(tmp_path / "other" / ".." / "model")
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match="is model_name_or_path: the trained model would overwrite"):
        check_saving(trainer, str(tmp_path / "model"))
    (tmp_path / "link").symlink_to(tmp_path / "model")
    with pytest.raises(ValueError, match="is model_name_or_path"):
        check_saving(trainer, str(tmp_path / "link"))


def test_what_cannot_be_written_of_the_model_is_named(
    trainer: Any, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: Any, **values: Any) -> None:
        raise TypeError("Object of type Odd is not JSON serializable")

    for owner, said in (
        (trainer.model.config, "the model's config"),
        (trainer.processing_class, "the tokenizer"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(type(owner), "save_pretrained", fail)
            refused(trainer, f"{said}.* cannot be written: Object of type Odd")
    trainer.args.odd = lambda: None  # cannot be pickled
    refused(trainer, "training_args.bin cannot be written")
    del trainer.args.odd
    assert not out.exists()


def test_pushes_without_weights_are_refused(trainer: Any, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer.args, "push_to_hub", True)
    for strategy in HubStrategy:
        monkeypatch.setattr(trainer.args, "hub_strategy", strategy)
        monkeypatch.setattr(trainer, "is_fsdp_enabled", False)
        assert check_saving(trainer, "elsewhere") == []
        monkeypatch.setattr(trainer, "is_fsdp_enabled", True)
        if strategy == HubStrategy.END:
            assert check_saving(trainer, "elsewhere") == []
        else:
            refused(trainer, f"hub_strategy={strategy.value} with FSDP2: .*write hub_strategy: end")


@pytest.fixture
def spoilt(trainer: Any) -> Any:
    kept = trainer.model.generation_config
    trainer.model.generation_config = GenerationConfig.from_dict(kept.to_dict())
    yield trainer.model.generation_config
    trainer.model.generation_config = kept


def test_values_for_sampling_without_sampling_are_left_out(trainer: Any, out: Path, spoilt: Any) -> None:
    spoilt.update(do_sample=False, temperature=0.9, top_p=0.6, max_new_tokens=7)
    with pytest.raises(ValueError, match="temperature"):
        spoilt.validate(strict=True)
    (line,) = check_saving(trainer, "elsewhere")
    assert line.startswith("generation_config.json has temperature=0.9, top_p=0.6 without do_sample, which")
    save_model(trainer)
    saved = json.loads((out / "generation_config.json").read_text())
    assert not {"temperature", "top_p"} & set(saved)
    assert saved["max_new_tokens"] == 7
    AutoModelForCausalLM.from_pretrained(out)


def test_a_generation_config_that_cannot_be_mended_is_refused(trainer: Any, out: Path, spoilt: Any) -> None:
    spoilt.num_return_sequences, spoilt.num_beams = 3, 1
    refused(
        trainer, r"generation_config.json of the model cannot be saved again: .*: mend the file, or delete"
    )
    assert not out.exists()
