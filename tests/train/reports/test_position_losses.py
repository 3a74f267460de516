"""Loss by position adds up to the loss that is logged, whatever the batches and the model are like."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from trl import DPOTrainer, SFTTrainer
from trl.experimental.gkd import GKDTrainer

from chunkdist.train.build import ChunkSFTTrainer, build_trainer, chunk_trainer
from chunkdist.train.options.arguments import parse_options
from chunkdist.train.reports.callback import ChunkCallback
from chunkdist.train.reports.metrics_file import _curves
from chunkdist.train.reports.position_losses import position_losses_of
from chunkdist.train.trainers.pairs import CheckedDPOTrainer
from tests.distributed.launched import save_initial_model
from tests.helpers.position_tables import OPTIONS, check_run, data_in, records_in
from tests.helpers.tiny_run import command_line, make_model_folder

PACKED = {"packing": True, "eval_packing": False, "per_device_train_batch_size": 1}
LORA = {"use_peft": True, "lora_target_modules": "all-linear"}
CASES: dict[str, dict[str, Any]] = {
    "padded": {},
    "plain": {"chunk_method": "none"},
    "packed": PACKED,
    "plain, packed": {"chunk_method": "none", **PACKED},
    "streams": {"chunk_packing": True},
    "LoRA": LORA,
    "plain, LoRA": {"chunk_method": "none", **LORA},
    "SpaCO": {"chunk_method": "spaco", "spaco_budget": 2},
    "compiled": {"chunk_method": "none", "torch_compile": True, "torch_compile_backend": "eager"},
}


@pytest.mark.parametrize("name", CASES)
def test_it_adds_up_to_the_loss(name: str, tmp_path: Path) -> None:
    model = make_model_folder(tmp_path / "model")
    save_initial_model(model)
    values = {**OPTIONS, "dataset_name": data_in(tmp_path / "data"), **CASES[name]}
    trainer, config = build_trainer(parse_options(command_line(model, [], **values)))
    chunk_trainer(trainer, config)
    causal_lm = trainer.model.get_base_model() if "use_peft" in values else trainer.model
    forward = causal_lm.__dict__.get("forward")
    ChunkCallback.add_to(trainer, config)
    trainer.train()
    check_run(tmp_path / "out")
    assert causal_lm.__dict__.get("forward") == forward  # nothing stays on the model
    assert (tmp_path / "out" / "training.png").read_bytes().startswith(b"\x89PNG")
    curves = _curves(records_in(tmp_path / "out"))
    assert [label for label, _ in curves] == ["eval, step 0", "eval, step 2"]


def test_trainers_whose_loss_is_another() -> None:
    class Model:
        pass

    def of(kind: type) -> Any:
        trainer = kind.__new__(kind)
        trainer.model, trainer.args = Model(), type("Arguments", (), {"per_device_eval_batch_size": 1})()
        return position_losses_of(trainer)

    assert of(ChunkSFTTrainer) is not None
    assert of(SFTTrainer) is not None
    assert not [kind for kind in (DPOTrainer, CheckedDPOTrainer, GKDTrainer) if of(kind) is not None]


def test_curves_of_training_where_nothing_is_evaluated() -> None:
    """The first and the last tenth of the steps, all their tokens alike."""
    records = [{"step": step, "loss_by_position": [[0, 64, float(step), step]]} for step in range(1, 21)]
    first, last = _curves([*records, {"step": 21, "loss": 1.0}])
    assert first == ("training, steps 1 to 2", [[0, 64, pytest.approx(5 / 3), 3]])
    assert last == ("training, steps 19 to 20", [[0, 64, pytest.approx((19**2 + 20**2) / 39), 39]])
    assert _curves([{"step": 1, "loss": 1.0}]) == []
