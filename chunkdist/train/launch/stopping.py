"""A run that is told to stop saves a checkpoint when its step ends, and leaves.

SIGTERM (Slurm, spot machines), SIGINT (Ctrl-C) and a launcher that is gone are told to one rank, to some, or
to all, at different times. At the end of each step the ranks agree in one collective of one number, so that
all save the same step. transformers' own `JITCheckpointCallback` (5.23) asks no other rank, saves between
backward and optimizer step, and leaves with status 0; it has the name of the option,
`enable_jit_checkpoint`, that is on here unless it is written as false.
"""

from __future__ import annotations

import atexit
import os
import select
import signal
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.sharedctypes import RawValue
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import distributed
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from chunkdist.train.launch.parent import Launchers

if TYPE_CHECKING:
    from transformers import Trainer

STOPPED = 75
"""The exit status of a run that has saved: sysexits' EX_TEMPFAIL, "try again later"."""
SIGNALS = (signal.SIGTERM, signal.SIGINT)
_LAUNCHER_GONE = 1000
"""Among the numbers of signals, and above them."""
_SAME_S = 3.0
"""Signals that come this soon after the first are the same one: it was sent to a group of processes, and
their launcher has sent it once more."""
_POLL_S = 1.0
_UNHEARD_S = 10.0
"""How long a process whose launcher is gone may take to hear of it before its first step."""


class Stopped(BaseException):
    """The run was told to stop. Like `KeyboardInterrupt` it is no `Exception`, for nothing has failed.

    Attributes:
        status: The exit status.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class StopSignals:
    """What this process was told, from `start` to `close`.

    Before training begins the first signal raises `Stopped` in the main thread. From then on it is only
    noted, and `StopCallback` acts on it. A second one ends the process at once, even where the main thread
    waits in a collective and runs no Python: a thread of its own hears of signals, and sees when the
    launcher is gone.

    Outside of the main thread, and where something else (asyncio) has asked to be woken by signals, all
    signals are left as they are.
    """

    def __init__(self) -> None:
        self.told = 0
        """The number of the first signal."""
        self.is_training = False
        self.saves = True
        """Whether a checkpoint will be saved: false with `enable_jit_checkpoint: false`."""
        self.status: int | None = None
        """The exit status, once it is known."""
        self.is_leaving: Any = None
        """For the workers of data loaders, see `keep_workers`."""
        self._first_s = 0.0
        self._has_lost_launcher = self._is_closing = False
        self._handlers: dict[int, Any] = {}
        self._launchers = Launchers()
        self._reader, self._writer = socket.socketpair()
        self._thread: threading.Thread | None = None

    @classmethod
    def start(cls) -> StopSignals:
        stop = cls()
        if threading.current_thread() is threading.main_thread():
            stop._install()
        return stop

    def close(self) -> None:
        """Signals do what they did before."""
        self._is_closing = True
        if self.is_leaving is not None:
            self.is_leaving.value = 1
        if self._thread is not None:
            signal.set_wakeup_fd(-1)
            self._restore()
        with suppress(OSError):
            self._writer.shutdown(socket.SHUT_WR)  # the thread reads an end
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._reader.close()
        self._writer.close()

    def _install(self) -> None:
        self._writer.setblocking(False)
        before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        if before != -1:
            signal.set_wakeup_fd(before)
            return
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # as `nohup` and a shell's `&` leave it
                self._handlers[number] = signal.signal(number, self._handle)
        forget = weakref.WeakMethod(self._forget)
        os.register_at_fork(after_in_child=lambda: (forget() or _nothing)())
        self._thread = threading.Thread(target=self._listen, name="chunkdist-stop", daemon=True)
        self._thread.start()

    def _restore(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()

    def _forget(self) -> None:
        """In a forked child: a signal to a worker is none to this process."""
        if self._thread is not None:
            self._thread = None
            signal.set_wakeup_fd(-1)
            self._restore()

    def _handle(self, number: int, frame: Any) -> None:
        """In the main thread. Whether a step has begun decides what a first signal does."""
        if not self.is_training and self.status is None and not self._is_closing:
            told = self.told or number
            self.status = 128 + (signal.SIGTERM if told == _LAUNCHER_GONE else told)
            what = "before the first step, nothing was saved"
            if not self.saves:
                what = "nothing was saved (enable_jit_checkpoint: false)"
            raise Stopped(f"stopped by {name_of(told)}: {what}", self.status)

    def _listen(self) -> None:
        while True:
            ready, _, _ = select.select([self._reader], [], [], _POLL_S)
            if ready:
                heard = self._reader.recv(64)
                if not heard:
                    return
                for number in heard:
                    if number in self._handlers:
                        self._hear(number)
            if not self._has_lost_launcher and self._launchers.are_gone():
                self._has_lost_launcher = True
                self._hear(_LAUNCHER_GONE)
                if not self.is_training:
                    os.kill(os.getpid(), signal.SIGTERM)  # wakes the main thread
            is_late = time.monotonic() - self._first_s > _UNHEARD_S
            if self._has_lost_launcher and is_late and not self.is_training:
                self._end(128 + signal.SIGTERM)

    def _hear(self, number: int) -> None:
        now = time.monotonic()
        if not self.told:
            self.told, self._first_s = number, now
            if self.is_training and os.environ.get("RANK", "0") == "0":
                _say(f"{name_of(number)}: stopping when this step has ended; a second signal ends at once")
        elif number != _LAUNCHER_GONE and now - self._first_s > _SAME_S:
            self._end(128 + number)

    def _end(self, status: int) -> None:
        if self.status is None:
            _say("ended at once, nothing was saved")
        os._exit(status if self.status is None else self.status)


class StopCallback(TrainerCallback):
    """Saves a complete checkpoint when a step has ended, if a rank was told to stop, and raises `Stopped` on
    all ranks. What the step would have evaluated is left to the run that goes on. A run whose last step it
    was ends as if it had not been told.

    Costs one collective of one number a step, where there are ranks.
    """

    def __init__(self, stop: StopSignals, trainer: Trainer) -> None:
        self._stop, self._trainer = stop, trainer
        self._agreed = 0

    @classmethod
    def add_to(cls, trainer: Trainer, stop: StopSignals) -> None:
        stop.saves = bool(trainer.args.enable_jit_checkpoint)
        if stop.saves:
            stop.is_leaving = RawValue("b", 0)
            keeper: Any = trainer  # `CheckedSFTTrainer` reads it for its other loaders
            keeper.is_leaving = stop.is_leaving
            trainer.add_callback(cls(stop, trainer))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._stop.is_training = True
        keep_workers(kwargs.get("train_dataloader"), self._stop.is_leaving)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._is_last(state) or not self._agree(args):
            return
        args.save_only_model = False
        control.should_log = control.should_save = True  # or the losses since the last log would be lost
        control.should_evaluate = False

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        is_between = self._trainer.is_in_train and 0 < state.global_step < state.max_steps
        if not is_between or not self._agree(args):
            return
        args.save_only_model = False
        model: Any = self._trainer.model
        # transformers' own callback (5.23) calls this private method, too.
        self._trainer._save_checkpoint(model, trial=None)
        self._leave(state)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self._is_last(state) and (self._agreed or (not args.save_only_model and self._agree(args))):
            self._leave(state)

    def _is_last(self, state: TrainerState) -> bool:
        return state.global_step >= state.max_steps

    def _agree(self, args: TrainingArguments) -> int:
        """What the ranks were told; 0: nothing. Collective."""
        self._agreed = self._stop.told
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            told = torch.tensor(self._agreed, device=args.device)
            distributed.all_reduce(told, distributed.ReduceOp.MAX)
            self._agreed = int(told)
        return self._agreed

    def _leave(self, state: TrainerState) -> None:
        self._stop.status, self._stop.is_leaving.value = STOPPED, 1
        checkpoint = f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        raise Stopped(
            f"stopped by {name_of(self._agreed)}, {checkpoint} saved: run the same command with "
            "resume_from_checkpoint: true to go on",
            STOPPED,
        )


def keep_workers(loader: Any, is_leaving: Any) -> None:
    """A signal to the whole group of processes does not take a loader's workers away from a step that is to
    be finished.

    Args:
        is_leaving: A number in shared memory; other than 0, workers end when they are told to.
    """
    if not isinstance(loader, DataLoader) or loader.num_workers == 0:
        return
    if not isinstance(loader.worker_init_fn, _Unmoved):
        loader.worker_init_fn = _Unmoved(loader.worker_init_fn, is_leaving)


class _Unmoved:
    """A worker's start: it sees to signals, then does what it would have done."""

    def __init__(self, start: Callable[[int], Any] | None, is_leaving: Any) -> None:
        self._start, self._is_leaving = start, is_leaving

    def __call__(self, worker: int) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._handle)
        if self._start is not None:
            self._start(worker)

    def _handle(self, number: int, frame: Any) -> None:
        if self._is_leaving.value:
            os._exit(0)


def leave(status: int) -> NoReturn:
    """Ends the process. One that was told to stop does what was registered to be done at exit, and no more:
    to take down all modules takes seconds, and its launcher waits for it, or has begun to kill."""
    if status in {STOPPED, *(128 + number for number in SIGNALS)}:
        atexit._run_exitfuncs()
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def name_of(told: int) -> str:
    """What a rank was told, in words."""
    return "the loss of its launcher" if told == _LAUNCHER_GONE else signal.Signals(told).name


def _say(line: str) -> None:
    with suppress(OSError):  # the terminal may be gone
        print(f"chunkdist: {line}", file=sys.stderr, flush=True)


def _nothing() -> None:
    pass
