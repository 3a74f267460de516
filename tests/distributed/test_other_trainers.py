"""launchers/train.py, dpo.py and grpo.py on two ranks whose weights are sharded: losses and weights of the
same run without chunks."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed
from transformers import AutoModelForCausalLM

from tests.distributed.launched import PRESETS, environment_of, figures, wrapping_engine
from tests.distributed.ranks import Ranks
from tests.helpers.tiny_run import ROOT, load_script, write_rows
from tests.launchers.test_other_trainers import ROWS, options_of

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")


def train(kind: str, engine: str, arguments: list[str]) -> int:
    """One run on every rank. The exit status."""
    from accelerate.state import AcceleratorState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    launcher = load_script(ROOT / "launchers" / f"{kind}.py")
    seen: list[str] = []
    destroy, distributed.destroy_process_group = distributed.destroy_process_group, lambda: None
    try:
        with environment_of(engine), engines_seen(seen):
            status: int = launcher.main(arguments)
    finally:
        distributed.destroy_process_group = destroy
        unset_hf_deepspeed_config()
        AcceleratorState._reset_state(True)
        gc.collect()
    assert set(seen) == {engine}
    distributed.barrier()
    return status


@contextmanager
def engines_seen(seen: list[str]) -> Iterator[None]:
    from chunkdist.train.trainers.checked import CheckedTrainer

    def training_step(self: Any, *given: Any, **values: Any) -> Any:
        seen.append(wrapping_engine(self))
        return super(CheckedTrainer, self).training_step(*given, **values)

    CheckedTrainer.training_step = training_step  # type: ignore[method-assign]
    try:
        yield
    finally:
        del CheckedTrainer.training_step


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
@pytest.mark.parametrize("kind", ["train", "dpo", "grpo"])
def test_chunks_change_nothing(two_ranks: Ranks, tmp_path: Path, kind: str, engine: str) -> None:
    outcomes = []
    for method in ("none", "seco"):
        given: dict[str, Any] = {"use_peft": None, "lora_target_modules": None, "use_cpu": None}
        given |= {"chunk_method": method, "save_strategy": "no", "dtype": "float32"}
        given |= {"output_dir": tmp_path / method / "out", "optim": "sgd"}
        if kind == "grpo":
            given["beta"] = 0.0
        elif kind == "train":
            texts = [{"text": row["prompt"] + row["chosen"]} for row in ROWS]
            given["dataset_name"] = write_rows(tmp_path / "texts.jsonl", texts)
        if engine == "zero3":
            given["deepspeed"] = PRESETS / "deepspeed" / f"{engine}.json"
        assert two_ranks.run(train, kind, engine, options_of(tmp_path, kind, **given)) == [0, 0]
        weights = dict(AutoModelForCausalLM.from_pretrained(tmp_path / method / "out").state_dict())
        outcomes.append((figures(tmp_path / method, "loss", "grad_norm"), weights))
    (expected, weights), (found, chunked) = outcomes
    assert sorted(found) == [1, 2, 3]
    assert any(loss or norm for loss, norm in expected.values())
    for step, values in expected.items():
        assert found[step] == pytest.approx(values, rel=1e-5, abs=1e-7)
    for name, value in weights.items():
        torch.testing.assert_close(chunked[name], value, rtol=0, atol=1e-6, msg=name)
