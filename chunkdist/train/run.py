"""One training run, from the command line to a saved model; the files in `launchers/` name its trainer."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from torch import distributed

from chunkdist.check.gradients import check_gradients
from chunkdist.config import ChunkConfig
from chunkdist.errors import BadSampleError
from chunkdist.memory.machine import use_expandable_segments
from chunkdist.train.build import build_trainer, check_blocker, chunk_trainer, first_batch
from chunkdist.train.checkpoints.save_check import try_saving
from chunkdist.train.checkpoints.saving import is_disk_full, removed_if_empty
from chunkdist.train.ending import end_run
from chunkdist.train.launch.failures import FailureWatch, RankFailure, named_failures, speaks_here
from chunkdist.train.launch.faults import StepWatch, input_fault
from chunkdist.train.launch.output import print_once
from chunkdist.train.launch.stopping import StopCallback, Stopped, StopSignals
from chunkdist.train.options.arguments import TrainerKind, TrainingOptions, parse_options
from chunkdist.train.out_of_memory import explained_out_of_memory
from chunkdist.train.reports.callback import ChunkCallback
from chunkdist.train.trainers.pipeline import PipelineSFTTrainer


def run(kind: TrainerKind, arguments: Sequence[str] | None = None) -> int:
    """One training run of a trainer; returns the exit status."""
    watch, steps, stop = None, StepWatch(), StopSignals.start()
    use_expandable_segments()
    try:
        options = parse_options(arguments, kind)
        watch = FailureWatch.start()
        with named_failures(watch), removed_if_empty(options.training.output_dir):
            trainer = set_up(options)
            if trainer is None:
                return 1
            chunked = options.chunk.chunk_method != "none"
            if isinstance(trainer, PipelineSFTTrainer):
                chunked = False
                if watch is not None:
                    watch.role_of = trainer.role_of
            trainer.add_callback(steps)
            StopCallback.add_to(trainer, stop)
            with explained_out_of_memory(trainer, is_chunked=chunked):
                trainer.train(resume_from_checkpoint=trainer.resumes_from)
                ending = end_run(trainer)
        return fail(ending.line, ending.status) if ending.status else 0
    except Stopped as stopped:
        return fail(stopped, stopped.status)
    except RankFailure as error:
        return fail(error, status=1)
    except BadSampleError as error:  # of a stream, known only when it comes
        return fail(error)
    except Exception as error:
        line = str(error) if is_disk_full(error) else input_fault(error, is_set_up=steps.has_begun)
        if line is None:
            raise
        return fail(line, cause=error)
    finally:
        if distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()  # a gloo process that just leaves sometimes aborts
        if watch is not None:
            watch.leave()
        stop.close()


def set_up(options: TrainingOptions) -> Any:
    """The trainer, its model chunked; `None` when the gradient check failed."""
    trainer, chunk_config = build_trainer(options)
    try_saving(trainer, str(options.model.model_name_or_path))
    if not gradients_agree(trainer, chunk_config, options):
        return None
    chunk_trainer(trainer, chunk_config)
    ChunkCallback.add_to(trainer, None if isinstance(trainer, PipelineSFTTrainer) else chunk_config)
    return trainer


def gradients_agree(trainer: Any, config: ChunkConfig | None, options: TrainingOptions) -> bool:
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


def fail(error: BaseException | str, status: int = 2, *, cause: BaseException | None = None) -> int:
    """One line on each machine; launchers repeat the exit status, not the line."""
    if speaks_here(cause or error):
        print(f"chunkdist: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    return status
