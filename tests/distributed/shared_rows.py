"""Trainers whose ranks share rows, on every rank of a group: TRL's own, and the launcher's."""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, distributed, nn

from chunkdist import ChunkConfig, chunk_model
from chunkdist.train.build import build_trainer, chunk_trainer
from chunkdist.train.launch.ranks import skip_shm_build, tell_ranks
from chunkdist.train.options.arguments import parse_options
from tests.distributed.test_refuse_sequence import left_as_it_was
from tests.helpers.models import tiny_llama
from tests.helpers.tiny_run import command_line, make_model_folder

LENGTHS = (22, 37, 9, 60, 14, 31)
NUM_STEPS, LEARNING_RATE = 5, 0.05


def rows(lengths: tuple[int, ...] = LENGTHS) -> list[dict[str, Any]]:
    """The first tokens of each, up to more than half of it, are a prompt."""
    made = []
    for number, length in enumerate(lengths):
        ids = [(7 * number + 5 * i * i) % 60 for i in range(length)]
        prompt = (length * number) // 7
        made.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return made


def by_hand(learning_rate: float = LEARNING_RATE) -> tuple[list[float], Tensor]:
    """Losses, and weights at the end, of one process that takes a sample a step."""
    model = tiny_llama(dtype=torch.float32, num_layers=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    losses = []
    for row in rows((24,) * NUM_STEPS):
        inputs = {name: torch.tensor(x)[None] for name, x in row.items()}
        loss = model(**inputs, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, flat(model)


def flat(model: nn.Module) -> Tensor:
    """All weights, whole."""
    from deepspeed.runtime.zero import GatheredParameters

    is_sharded = any(hasattr(p, "ds_id") for p in model.parameters())
    with GatheredParameters(list(model.parameters())) if is_sharded else nullcontext():
        weights = [p.detach() for _, p in sorted(model.named_parameters())]
        return torch.cat([(p.full_tensor() if hasattr(p, "full_tensor") else p).flatten() for p in weights])


def ulysses_trainer(stage: int) -> tuple[float, float]:
    """TRL's `SFTTrainer` with Accelerate's `sp_size`, as their docs have it: errors of losses and updates.

    Under ZeRO-1 and ZeRO-2, gradients are multiplied by `sp_size` there (transformers 5.23, deepspeed 0.19),
    with chunks and without.
    """
    import deepspeed
    from accelerate.state import PartialState
    from accelerate.utils import DeepSpeedSequenceParallelConfig, ParallelismConfig
    from trl import SFTConfig, SFTTrainer

    expected, weights = by_hand(LEARNING_RATE * (1 if stage == 3 else distributed.get_world_size()))
    model = tiny_llama(attn_implementation="sdpa", dtype=torch.float32, num_layers=2)  # before ZeRO-3 is on
    skip_shm_build()
    with left_as_it_was(), tempfile.TemporaryDirectory() as folder:
        import os

        os.environ.pop("ACCELERATE_USE_CPU", None)
        args = SFTConfig(
            folder,
            per_device_train_batch_size=1,
            max_steps=NUM_STEPS,
            report_to="none",
            optim="sgd",
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            logging_steps=1,
            disable_tqdm=True,
            save_strategy="no",
            bf16=False,
            pad_to_multiple_of=2,
            gradient_checkpointing=False,
            train_sampling_strategy="sequential",
            parallelism_config=ParallelismConfig(
                sp_size=2,
                sp_handler=DeepSpeedSequenceParallelConfig(
                    sp_seq_length_is_variable=True, sp_attn_implementation="sdpa"
                ),
            ),
            deepspeed={
                "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
                "train_micro_batch_size_per_gpu": 1,
                "zero_allow_untested_optimizer": True,
                "gradient_clipping": 0.0,
            },
        )
        deepspeed.init_distributed("gloo")
        tell_ranks(PartialState())
        from transformers import AutoTokenizer

        from tests.helpers.tiny_run import BYTE_LLAMA

        chunk_model(model, ChunkConfig(chunk_size=8))
        trainer = SFTTrainer(
            model=model,
            args=args,
            train_dataset=Dataset.from_list(rows((24,) * NUM_STEPS)),
            processing_class=AutoTokenizer.from_pretrained(BYTE_LLAMA),
        )
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        found = flat(model)
    before = flat(tiny_llama(dtype=torch.float32, num_layers=2))
    largest = max(abs(a - b) / b for a, b in zip(losses, expected, strict=True))
    return largest, float((found - weights).norm() / (weights - before).norm())


def launched(values: dict[str, Any]) -> tuple[list[float], Tensor]:
    """The launcher's trainer: losses, and weights at the end."""
    with left_as_it_was(), tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        arguments = command_line(
            make_model_folder(folder / "model"),
            rows(),
            **{
                "optim": "sgd",
                "learning_rate": LEARNING_RATE,
                "lr_scheduler_type": "constant",
                "max_steps": NUM_STEPS,
                "report_to": "none",
                "chunk_check": False,
                "use_cpu": "deepspeed" not in values,
                **values,
            },
        )
        if "deepspeed" in values:
            import os

            os.environ.pop("ACCELERATE_USE_CPU", None)
        trainer, config = build_trainer(parse_options(arguments))
        chunk_trainer(trainer, config)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        found = flat(trainer.model)
    return losses, found


def launched_errors(cases: dict[str, dict[str, Any]], expected: dict[str, Any]) -> dict[str, float]:
    """The largest error of a case's losses, and of its weights, by the largest of each."""
    errors = {}
    for name, values in cases.items():
        losses, weights = launched(values)
        wanted_losses, wanted = expected[name]
        of_losses = max(abs(a - b) / b for a, b in zip(losses, wanted_losses, strict=True))
        errors[name] = max(of_losses, float((weights - wanted).abs().max() / wanted.abs().max()))
    return errors
