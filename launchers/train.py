"""Trains a causal language model on long sequences with TRL's SFTTrainer, chunk by chunk.

    accelerate launch launchers/train.py --config configs/quickstart.yaml [--option value ...]

Runs under `python`, `accelerate launch`, `deepspeed` and `torchrun` alike. Exit status 2: the input is at
fault, and one line says how; 1: the gradient check or another rank failed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from torch import distributed

from chunkdist import ChunkConfig, UnsupportedModelError
from chunkdist.check.gradients import check_gradients
from chunkdist.memory.machine import use_expandable_segments
from chunkdist.train.build import build_trainer, check_blocker, chunk_trainer, first_batch
from chunkdist.train.callback import ChunkCallback
from chunkdist.train.failures import FailureWatch, RankFailure, named_failures
from chunkdist.train.options import TrainingOptions, parse_options
from chunkdist.train.out_of_memory import explained_out_of_memory
from chunkdist.train.saving import is_disk_full, removed_if_empty, save_model
from chunkdist.train.trainers.checked import CheckedSFTTrainer, print_once
from chunkdist.train.trainers.pipeline import PipelineSFTTrainer


def main(arguments: Sequence[str] | None = None) -> int:
    """One training run; returns the exit status."""
    watch = None
    use_expandable_segments()
    try:
        try:
            options = parse_options(arguments)
            watch = FailureWatch.start()
            with named_failures(watch), removed_if_empty(options.training.output_dir):
                trainer = set_up(options)
        except (ValueError, NotImplementedError) as error:
            return fail(error)
        if trainer is None:
            return 1
        chunked = options.chunk.chunk_method != "none"
        if isinstance(trainer, PipelineSFTTrainer):
            chunked = False
            if watch is not None:
                watch.role_of = trainer.role_of
        with named_failures(watch), explained_out_of_memory(trainer, is_chunked=chunked):
            trainer.train(resume_from_checkpoint=trainer.resumes_from)
            print_once(f"model saved to {save_model(trainer)}")
        return 0
    except UnsupportedModelError as error:  # some models are known only in their first step
        return fail(error)
    except Exception as error:
        if isinstance(error, RankFailure) or is_disk_full(error):
            return fail(error, status=1 if isinstance(error, RankFailure) else 2)
        raise
    finally:
        if distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()  # a gloo process that just leaves sometimes aborts
        if watch is not None:
            watch.leave()


def set_up(options: TrainingOptions) -> CheckedSFTTrainer | None:
    """The trainer, its model chunked; `None` when the gradient check failed."""
    trainer, chunk_config = build_trainer(options)
    if not gradients_agree(trainer, chunk_config, options):
        return None
    chunk_trainer(trainer, chunk_config)
    ChunkCallback.add_to(trainer, None if isinstance(trainer, PipelineSFTTrainer) else chunk_config)
    return trainer


def gradients_agree(trainer: CheckedSFTTrainer, config: ChunkConfig | None, options: TrainingOptions) -> bool:
    """Runs the gradient check on a short sample and prints its report; true also where it cannot run."""
    if config is None or not options.chunk.chunk_check:
        return True
    if blocker := check_blocker(trainer):
        print_once(f"gradient check left out: {blocker}")
        return True
    with trainer.accelerator.autocast():
        result = check_gradients(trainer.model, first_batch(trainer), config)
    print_once(result.report())
    return bool(result.passed)


def fail(error: BaseException, status: int = 2) -> int:
    """One line on each machine; launchers repeat the exit status, not the line."""
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        print(f"chunkdist: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
