"""`ChunkCallback`: what a person sees of a chunked run under `transformers.Trainer`, or any trainer made from
it.

At the start a table of what was chosen and why; at every logged step throughput and memory, among the
trainer's own figures, so that its progress bar, its trackers (W&B) and `metrics.jsonl` show the same; at the
end a picture and a line.
"""

from __future__ import annotations

import logging
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch import nn
from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from chunkdist.chunking import ChunkReport, chunk_report, num_computed, resolve_auto_values
from chunkdist.config import ChunkConfig
from chunkdist.loss.by_position import NOTHING, LossByPosition
from chunkdist.models.flops import peak_flops
from chunkdist.spaco.sample import SampleReport
from chunkdist.train.launch.engine import engine_of
from chunkdist.train.reports.metrics_file import BY_POSITION, MetricsFile, draw
from chunkdist.train.reports.position_losses import PositionLosses, position_losses_of
from chunkdist.train.reports.start_table import start_table, step_sizes, with_expected_attention
from chunkdist.train.reports.token_counter import TokenCounter

if TYPE_CHECKING:
    from transformers import Trainer

logger = logging.getLogger(__name__)

NOISY_VARIANCE, NUM_SAMPLES_TO_JUDGE = 3.0, 10
"""A person is warned from this mean relative variance of SpaCO's samples on, over so many samples."""


class ChunkCallback(TrainerCallback):
    """Adds to the training logs `tokens_per_second`, `step_time_s`, `num_tokens_seen`, peak memory and, on a
    known GPU, `mfu`; writes `metrics.jsonl` and `training.png` to `output_dir`. Everything is rank 0's, the
    figures are of all ranks. The figures of an evaluation have a line of their own in `metrics.jsonl`.

    `ChunkCallback.add_to(trainer, config)` puts it before the trainer's other callbacks; behind them
    (`trainer.add_callback`), its figures still reach `metrics.jsonl`, but not the progress bar and the
    trackers.

    - A logged step costs two collectives of a few numbers. Steps that are not logged are not waited for.
    - `step_time_s` covers loading data, not evaluation and saving.
    - `peak_memory_gib` is the largest of the ranks' `torch.cuda.max_memory_allocated()`, `peak_rss_gib` (on a
      CPU) the largest of the processes' resident memory; both since the process started.
    - `spaco_*`: chunks and tokens that SpaCO kept on rank 0 since the last log, the largest weight, and the
      mean of `SampleReport.relative_variance`.
    - `mfu` is by model FLOPs, see `chunkdist.models.flops`, as far as tokens were not shared.
    - `loss_by_position/0-1K`, `/1-4K`, ... are the mean losses of the tokens at these positions of their own
      sequences, since the last log (and `eval_loss_by_position/...`, of an evaluation); `metrics.jsonl` has
      finer ranges in `loss_by_position`: rows of first position, end, mean loss, number of tokens.
    - `num_tokens_computed` is there where it is not `num_tokens_seen`: shared prefixes are computed once, and
      padding where rows stay rows, too.
    - A file that cannot be written costs one warning; training goes on.

    Args:
        config: The chunked model's config; `None` for a plain one, which gets the metrics without the table.
        model: The trainer's.
        stream_tokens: Tokens of the longest stream, where a micro-batch is one.
        counter: Counts what the model is fed with; `None`: one is hooked to the model.
        positions: Makes what notes the losses of tokens by their position, when training begins; `None`: they
            are not noted, as under a trainer whose loss is another.
    """

    def __init__(
        self,
        config: ChunkConfig | None,
        *,
        model: nn.Module,
        output_dir: str | Path,
        console: Console | None = None,
        stream_tokens: int | None = None,
        counter: TokenCounter | None = None,
        positions: Callable[[], PositionLosses] | None = None,
    ) -> None:
        self._given_counter = counter
        self._noted_by = positions
        self.positions: PositionLosses | None = None
        self._config = config
        self._model = model
        self._stream_tokens = stream_tokens
        self._metrics = MetricsFile(Path(output_dir) / "metrics.jsonl")
        self.counter: TokenCounter | None = None
        self._num_tokens_seen = 0
        self._num_tokens_computed = self._computed_before = 0
        self._expected: ChunkReport | None = None
        self._has_warned = False
        self._samples: list[SampleReport] = []
        self._first_variances: list[float] = []
        self._mark = self._seconds = self._first_step = 0.0
        self._num_steps = 0

    @classmethod
    def add_to(cls, trainer: Trainer, config: ChunkConfig | None) -> ChunkCallback:
        """Adds the callback where its figures reach the others."""
        assert trainer.model is not None
        callback = cls(
            config,
            model=trainer.model,
            output_dir=trainer.args.output_dir or ".",
            stream_tokens=getattr(trainer, "stream_tokens", None),
            counter=getattr(trainer, "tokens", None),
            positions=position_losses_of(trainer),
        )
        trainer.callback_handler.callbacks.insert(0, callback)
        return callback

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._stop_counting()  # an earlier run may have died
        self.counter = self._given_counter or TokenCounter(self._model)
        self.positions = None if self._noted_by is None else self._noted_by()
        self._num_tokens_seen, self._num_tokens_computed, self._expected = 0, 0, None
        self._computed_before = 0 if self._config is None else num_computed(self._model)
        self._forget_time()
        if self._config is not None:
            sizes = step_sizes(args, self._stream_tokens)
            if sizes.num_tokens is not None:
                resolve_auto_values(self._model, **asdict(sizes), engine=engine_of(args))
        if not state.is_world_process_zero:
            return
        self._try(lambda: self._open_metrics(state.global_step))
        if self._config is not None:
            report = chunk_report(self._model)
            self._expected = with_expected_attention(self._model, report, args)
            console = Console(width=None if sys.stdout.isatty() else 110)
            console.print(start_table(self._model, self._config, self._expected, args, self._stream_tokens))

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        if not self._mark:
            self._mark = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._note_sample()
        self._take_time()
        self._num_steps += 1
        if self._expected is not None:
            report = chunk_report(self._model)
            if report.attention != self._expected.attention:
                self._say(f"attention is {report.attention} after all: {report.attention_reason}")
            self._expected = None

    def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
        self._note_sample()

    def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self._mark = time.perf_counter()

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        self._mark = time.perf_counter()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or self.counter is None:
            return
        prefix = next((key.removesuffix("runtime") for key in logs if _is_eval_time(key)), "")
        is_training = "loss" in logs and bool(self._num_steps)  # else an evaluation, or the end
        by_position = self._by_position(args, is_training=is_training) if prefix or is_training else NOTHING
        name = f"{prefix}{BY_POSITION}"
        logs.update({f"{name}/{key}": loss for key, loss in by_position.means().items()})
        if is_training:
            self._take_time()  # the loss has been read: the device is done
            logs.update(self._figures(args))
            self._forget_time(mark=self._mark)
        if (prefix or is_training) and state.log_history:
            # the trainer has noted its own figures before it asked the callbacks
            state.log_history[-1].update(logs)
        if state.is_world_process_zero and (is_training or any(key.startswith("eval_") for key in logs)):
            table = {name: by_position.table()} if any(by_position.num_tokens) else {}
            self._try(lambda: self._metrics.append({"step": state.global_step, **logs, **table}))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._stop_counting()
        if state.is_world_process_zero:
            self._try(self._finish)

    def _figures(self, args: TrainingArguments) -> dict[str, float]:
        assert self.counter is not None
        computed = 0 if self._config is None else num_computed(self._model)
        own = [computed - self._computed_before, *self.counter.take()]
        self._computed_before = computed
        (computed, *counts), peaks = _over_ranks(own, _peak_bytes(args.device), args.device)
        computed = computed or counts[0]  # the stages of a pipeline compute what they are given
        self._num_tokens_seen += counts[0]
        self._num_tokens_computed += computed
        memory_name = "peak_memory_gib" if args.device.type == "cuda" else "peak_rss_gib"
        figures = {
            "tokens_per_second": counts[0] / self._seconds,
            "step_time_s": self._seconds / self._num_steps,
            memory_name: max(peaks) / 2**30,
            "num_tokens_seen": self._num_tokens_seen,
        }
        if self._num_tokens_computed != self._num_tokens_seen:
            figures["num_tokens_computed"] = self._num_tokens_computed
        peak = peak_flops(torch.cuda.get_device_name(args.device)) if args.device.type == "cuda" else None
        if peak is not None:
            flops = self.counter.flops.from_counts(counts) * min(1.0, computed / max(1, counts[0]))
            figures["mfu"] = flops / self._seconds / (peak * len(peaks))
        return figures | self._sample_figures()

    def _by_position(self, args: TrainingArguments, *, is_training: bool) -> LossByPosition:
        """Of all ranks, since the last call."""
        if self.positions is None:
            return NOTHING
        own = self.positions.training if is_training else self.positions.evaluation
        sums = own.take(args.device)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        return LossByPosition.of(sums)

    def _note_sample(self) -> None:
        """SpaCO's sample of the micro-batch that has just ended."""
        sample = None if self._config is None else chunk_report(self._model).sample
        if sample is None:
            return
        self._samples.append(sample)
        if len(self._first_variances) < NUM_SAMPLES_TO_JUDGE:
            self._first_variances.append(sample.relative_variance)
            if len(self._first_variances) == NUM_SAMPLES_TO_JUDGE:
                self._warn_of_noise(sum(self._first_variances) / NUM_SAMPLES_TO_JUDGE)

    def _warn_of_noise(self, variance: float) -> None:
        if variance >= NOISY_VARIANCE and int(os.environ.get("RANK", "0")) == 0:
            self._say(
                f"warning: SpaCO's gradients are as noisy as with 1/{1 + variance:.0f} of the tokens "
                f"(relative variance {variance:.1f}): the learning rate may not survive it; "
                "raise spaco_budget, or compare learning rates over a few hundred steps"
            )

    def _sample_figures(self) -> dict[str, float]:
        samples, self._samples = self._samples, []
        if not samples:
            return {}
        return {
            "spaco_chunks_kept": sum(sample.num_kept for sample in samples),
            "spaco_chunks": sum(sample.num_chunks for sample in samples),
            "spaco_tokens_kept": sum(sample.tokens_kept for sample in samples),
            "spaco_largest_weight": max(sample.largest_weight for sample in samples),
            "spaco_relative_variance": sum(sample.relative_variance for sample in samples) / len(samples),
        }

    def _open_metrics(self, step: int) -> None:
        line = self._metrics.start(step)
        if line:
            self._say(line)
        if step and self._metrics.path.exists():
            records = [record for record in self._metrics.read() if "num_tokens_seen" in record]
            last: dict[str, Any] = records[-1] if records else {"num_tokens_seen": 0}
            self._num_tokens_seen = last["num_tokens_seen"]
            self._num_tokens_computed = last.get("num_tokens_computed", self._num_tokens_seen)

    def _finish(self) -> None:
        records = self._metrics.read() if self._metrics.path.exists() else []
        if not records:
            return
        picture = self._metrics.path.with_name("training.png")
        draw(records, picture)
        records = [record for record in records if "loss" in record] or records
        self._say(f"{_summary(records)}; {self._metrics.path} and {picture.name}")

    def _take_time(self) -> None:
        now = time.perf_counter()
        self._seconds += now - self._mark if self._mark else 0.0
        self._mark = now

    def _forget_time(self, mark: float = 0.0) -> None:
        self._mark, self._seconds, self._num_steps = mark, 0.0, 0

    def _stop_counting(self) -> None:
        if self.counter is not None:
            self.counter.remove()
            self.counter = None
        if self.positions is not None:
            self.positions.remove()
            self.positions = None

    def _try(self, write: Callable[[], None]) -> None:
        """Files are no reason to lose a run: one line for the first fault."""
        try:
            write()
        except OSError as error:
            if not self._has_warned:
                self._has_warned = True
                path = error.filename or self._metrics.path
                self._say(f"warning: {path}: {error.strerror or error}; training goes on without it")

    def _say(self, line: str) -> None:
        tqdm.write(f"chunkdist: {line}")  # print would break the trainer's progress bar


def _is_eval_time(key: str) -> bool:
    """Whether this is logged by an evaluation, of one of several sets of data perhaps (transformers 5.23)."""
    return key.startswith("eval_") and key.endswith("_runtime")


def _over_ranks(counts: list[int], peak_bytes: int, device: torch.device) -> tuple[list[int], list[int]]:
    """The sums of the ranks' counts, and each rank's peak."""
    own = torch.tensor([*counts, peak_bytes], dtype=torch.int64, device=device)
    every = [own]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        every = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(every, own)
    table = torch.stack(every).tolist()
    return [sum(column) for column in zip(*table, strict=True)][:-1], [row[-1] for row in table]


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS says bytes, Linux KiB


def _summary(records: list[dict[str, Any]]) -> str:
    first, last = records[0], records[-1]
    memory = next(
        (f"{key} {last[key]:.2f}" for key in ("peak_memory_gib", "peak_rss_gib") if key in last), ""
    )
    speeds = sorted(record["tokens_per_second"] for record in records if record.get("tokens_per_second"))
    parts = [f"{last['step']:,} steps", f"{last.get('num_tokens_seen', 0):,} tokens"]
    if speeds:
        parts.append(f"median {speeds[len(speeds) // 2]:,.0f} tokens/s")
    if None not in (first.get("loss"), last.get("loss")):
        parts.append(f"loss {first['loss']:.4g} -> {last['loss']:.4g}")
    return ", ".join([*parts, memory])
