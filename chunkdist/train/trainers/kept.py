"""A trainer whose work is kept: checkpoints are whole and belong to a run, the best one is found, a run
that is at its end stays there, and the weights are saved whatever else fails."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from chunkdist.train.checkpoints.model_parts import first_words, save_context, save_parts
from chunkdist.train.checkpoints.run_record import RunRecord
from chunkdist.train.checkpoints.saving import is_disk_full
from chunkdist.train.checkpoints.whole import delete_older, run_of, whole_checkpoint
from chunkdist.train.launch.output import print_once


class KeptTrainer(Trainer):
    """Before one of TRL's trainers among the bases: loses no work (transformers 5.23, TRL 1.15: their private
    methods)."""

    def __init__(self, **kwargs: Any) -> None:
        self._checkpoints: Path | None = None
        """Where checkpoints are made while one is being saved."""
        self.resumes_from: str | None = None
        """What to give to `train` as `resume_from_checkpoint`."""
        self.run: RunRecord | None = None
        """Written into `output_dir` when training begins, and into each checkpoint; `None`: not at all."""
        self.first_step = self.steps_taken = 0
        """The step at which `train` began, and those that it has taken: not those that a scaler skipped."""
        self.save_failures: list[str] = []
        """What could not be saved beside the weights, at the last save."""
        self.end_failure: Exception | None = None
        """What failed after the last step, when the weights were not touched any more."""
        self._has_best = False
        super().__init__(**kwargs)
        self.add_callback(_StepCounter(self))

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: Any,
    ) -> tuple[int, int]:
        """TRL's count of tokens goes on, too."""
        trained: tuple[int, int] = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        saved = None if resume_from_checkpoint is None else RunRecord.read(Path(resume_from_checkpoint))
        if saved is not None and saved.num_tokens is not None:
            self._total_train_tokens: Any = saved.num_tokens
        self.first_step, self.steps_taken = self.state.global_step, 0
        return trained

    def _run_epoch(self, *given: Any, **values: Any) -> None:
        """Nothing for a run that was at its end when it was resumed: transformers (5.23) trains a step before
        it looks."""
        if self.state.global_step >= self.state.max_steps:
            print_once(f"all {self.state.max_steps} steps are done: nothing is left to train")
            self.control.should_training_stop = True
            return
        super()._run_epoch(*given, **values)  # type: ignore[no-untyped-call]

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """The best evaluation has a checkpoint, though others are saved more rarely."""
        is_best: bool = super()._determine_best_metric(metrics, trial)
        if is_best and self.args.load_best_model_at_end:
            self.control.should_save = True
        return is_best

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Transformers' own, but the checkpoint has its name when it is whole, and older ones go after.

        Transformers looks whether the best one's folder is there, on each rank at another time: under FSDP2
        it is not yet, and ranks would load different ones. Here that follows from the steps alone.
        """
        args, state = self.args, self.state
        target = Path(super()._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        is_best = state.best_global_step == state.global_step
        best_checkpoint = str(target) if is_best else self._best_checkpoint(target.parent)
        limit, push = args.save_total_limit, args.push_to_hub
        with whole_checkpoint(target, args, self.accelerator.wait_for_everyone) as folder:
            self._checkpoints, args.save_total_limit, args.push_to_hub = folder, None, False
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._checkpoints, args.save_total_limit, args.push_to_hub = None, limit, push
            state.best_model_checkpoint = best_checkpoint
            if args.should_save:
                state.save_to_json(str(folder / target.name / TRAINER_STATE_NAME))
                if self.run is not None:
                    replace(self.run, num_tokens=self._total_train_tokens).write(folder / target.name)
        if push:
            self._push_from_checkpoint(str(target))
        if args.should_save:
            delete_older(target.parent, limit, newest=target, best=best_checkpoint)

    def _best_checkpoint(self, folder: Path) -> str | None:
        """The checkpoint of the best evaluation: this run's in `folder`, which may have been moved, or, where
        there is none, the one that was noted, also of a run that this one goes on from."""
        best = folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
        is_own = best.is_dir() and (self.run is None or run_of(best) == self.run.run)
        return str(best) if is_own else self.state.best_model_checkpoint

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Transformers' own; where it fails, the weights are written all the same, and what else can be."""
        self.save_failures = []
        try:
            super()._save(output_dir, state_dict)
        except Exception as error:
            if is_disk_full(error):
                raise
            failed = save_parts(self, Path(output_dir or self.args.output_dir or "."), state_dict)
            self.save_failures = failed or [f"as it should be: {type(error).__name__}: {first_words(error)}"]
            print_once(f"the weights are saved, but not {'; '.join(self.save_failures)}")
        save_context(self.model, Path(output_dir or self.args.output_dir or "."))

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._has_best = True

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> TrainOutput:
        """Transformers' own, but a callback that fails (a tracker without its network) loses no weights, and
        checkpoints of other runs stay."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        state = self.state
        if self.args.load_best_model_at_end:
            state.best_model_checkpoint = self._best_checkpoint(Path(super()._get_output_dir(trial)))
            if state.best_global_step and state.best_model_checkpoint is None:
                raise RuntimeError(
                    f"load_best_model_at_end=True, but checkpoint-{state.best_global_step}, of the best "
                    f"evaluation, is not there any more: put it back into {self.args.output_dir} and "
                    "resume, or resume with load_best_model_at_end: false for the last weights"
                )
        try:
            result: TrainOutput = super()._finalize_training(trial, num_train_samples, start_time)  # type: ignore[no-untyped-call]
        except Exception as error:
            if self.args.load_best_model_at_end and self.state.best_model_checkpoint and not self._has_best:
                raise  # these weights are not the ones that were asked for
            self.end_failure = error
            result = TrainOutput(self.state.global_step, math.nan, {})
        finally:
            self.args.save_total_limit = limit
        return result

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._checkpoints or super()._get_output_dir(trial))


class _StepCounter(TrainerCallback):
    """Counts the steps of an optimizer that were not skipped for an overflow (fp16)."""

    def __init__(self, trainer: KeptTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: TrainingArguments, *given: Any, **values: Any) -> None:
        """The run has its id before its first step, and not before all is ready for that."""
        if self._trainer.run is not None and args.should_save:
            self._trainer.run.write(Path(args.output_dir or "."))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trainer.steps_taken += not self._trainer.accelerator.optimizer_step_was_skipped
