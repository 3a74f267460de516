"""Training on token streams: the parts of `SFTTrainer` that know about batches, for mixed lengths.

A global batch is `per_device_train_batch_size` x ranks x `gradient_accumulation_steps` sequences, as without
packing. They are spread over ranks by cost and joined to streams of at most `max_length` tokens. Where a
batch needs more streams than there are accumulation steps, a step runs several, one after another: the number
of streams is the same on all ranks, the loss is divided by the supervised tokens of the global batch.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.data_loader import DataLoaderShard  # type: ignore[import-untyped]
from accelerate.utils import DistributedType  # type: ignore[import-untyped]
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset
from transformers.trainer_utils import seed_worker

from chunkdist.chunking import chunk_report, shared_prefixes
from chunkdist.config import ChunkConfig
from chunkdist.data.cost import SequenceCost
from chunkdist.data.prefixes import SamplePrefixes
from chunkdist.data.report import PackingReport, draw_lengths
from chunkdist.data.row_parts import RowParts
from chunkdist.data.sampler import StreamBatchSampler
from chunkdist.data.samples import sample_lengths
from chunkdist.data.streams import NO_LABEL, join_sequences
from chunkdist.models.layers import causal_lm_of
from chunkdist.stream.packed import refuse_segments
from chunkdist.train.reports.metrics_file import MetricsFile
from chunkdist.train.samples.stream_order import StreamOrder
from chunkdist.train.trainers.shared_rows import SharedRowsTrainer

if TYPE_CHECKING:
    from datasets import Dataset
    from torch.utils.data import DataLoader


Stream = dict[str, Tensor]
_COLUMNS = ("input_ids", "labels")
_TOKEN_MEANS = ("entropy", "mean_token_accuracy", "aux_loss")
"""What TRL logs of the tokens of a micro-batch; the last for a mixture of experts."""


class StreamSamples(TorchDataset[list[dict[str, Any]]]):
    """A dataset that is read by streams: an index is the sequences of one."""

    def __init__(self, samples: Dataset) -> None:
        self._samples = samples.select_columns(list(_COLUMNS))

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        columns = self._samples[list(indices)]
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def collate_streams(parts: RowParts, streams: list[list[dict[str, Any]]]) -> list[Stream]:
    """The streams of one item, or this rank's parts of them, each as a model takes it."""
    joined = [join_sequences(samples) for samples in streams]
    return joined if parts.num_ranks == 1 else [parts.part(stream) for stream in joined]


def _targets(stream: Stream) -> Tensor:
    """The labels that a model is to predict."""
    return stream["shift_labels"] if "shift_labels" in stream else stream["labels"][:, 1:]


def _num_tokens(stream: Stream) -> int:
    """0 for the one token of a stream that fills up."""
    return stream["input_ids"].shape[1] if "position_ids" in stream else 0


def _tokens_of(streams: list[Stream]) -> Stream:
    """What the trainer counts: the tokens of streams, without the one of a stream that fills up."""
    tokens = [stream["input_ids"][0] for stream in streams if "position_ids" in stream]
    ids = torch.cat([torch.empty(0, dtype=torch.long), *tokens])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class StreamTrainer(SharedRowsTrainer):
    """`SFTTrainer` whose training batches are lists of streams.

    Adds to the logs, for the steps since the last one: `packing_imbalance` (largest cost of a rank over the
    mean; the mean over steps), `packing_recomputed_share` (with a sampler, of rank 0), `packing_empty_share`
    and `packing_micro_batches`; all tokens and FLOPs by rank and micro-batch are in `packing.jsonl`, the
    lengths of the data in `lengths.png`, both in `output_dir`.
    """

    def __init__(self, *, chunk_config: ChunkConfig, **kwargs: Any) -> None:
        self._chunk_config = chunk_config
        super().__init__(**kwargs)
        self._lengths = sample_lengths(self.train_dataset)
        refuse_segments(causal_lm_of(self.model), max(self._lengths))
        rule = shared_prefixes(causal_lm_of(self.model), chunk_config)
        if self.row_parts.num_ranks > 1 or self.args.neftune_noise_alpha is not None:
            rule = None
        self._prefixes = None if rule is None else SamplePrefixes(self.train_dataset, rule)
        self._packing_file = MetricsFile(Path(self.args.output_dir or ".") / "packing.jsonl")
        self._last_reported_step: int | None = None
        self._has_warned = False
        self._num_supervised: Iterator[int] = iter(())
        """Supervised tokens of the micro-batches to come in this step, over all ranks."""
        self._step_tokens = 0
        """Tokens of all streams of this step, over all ranks."""
        self._balance_coefficient = self.router_aux_loss_coef
        self._metric_weights: list[int] = []
        self._tokens_sampled = self._tokens_rerun = 0
        self.order = StreamOrder(
            batch_sequences=self.get_total_train_batch_size(self.args),
            num_samples=len(self._lengths),
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            sampling=str(self.args.train_sampling_strategy),
        )
        self.add_callback(self.order)
        parallel = {"tp": self.get_tp_size(), "cp": self.get_cp_size(), "sp": self.get_sp_size()}
        if max(parallel.values()) > 1:
            raise ValueError(
                f"chunk_packing=True with ranks that share a sequence ({parallel}): write "
                "chunk_packing: false, or leave these parallel sizes at 1"
            )

    @property
    def stream_tokens(self) -> int:
        """Tokens of the longest stream: `max_length`, and no less than the longest sequence and a chunk."""
        args: Any = self.args
        return max(args.max_length or 0, max(self._lengths), int(self._chunk_config.chunk_size))

    def stream_sampler(self, *, num_ranks: int | None = None) -> StreamBatchSampler:
        """The plan of all epochs; equal on all ranks but for what it yields.

        Args:
            num_ranks: To plan for another number of them, or of sequence groups, than the job has.
        """
        args, own_ranks = self.args, self.num_replicas
        assert self.model is not None
        num_ranks = num_ranks or own_ranks
        return StreamBatchSampler(
            self._lengths,
            batch_sequences=self.order.values["batch_sequences"] // own_ranks * num_ranks,
            num_ranks=num_ranks,
            rank=self.replica,
            cost=SequenceCost.of(self.model),
            budget_tokens=self.stream_tokens,
            chunk_size=int(self._chunk_config.chunk_size),
            num_slots=args.gradient_accumulation_steps,
            seed=self.order.values["seed"],
            shuffle=args.train_sampling_strategy == "random",
            longest_first=True,
            prefixes=self._prefixes,
        )

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Not passed through `accelerator.prepare`, which would give each rank a part of its own part."""
        args = self.args
        loader: DataLoader[Any] = DataLoaderShard(
            StreamSamples(self.train_dataset),
            batch_sampler=self.stream_sampler(),
            collate_fn=partial(collate_streams, self.row_parts),
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            worker_init_fn=partial(
                seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index
            ),
        )
        return loader

    def get_batch_samples(
        self, epoch_iterator: Iterator[list[Stream]], num_batches: int, device: torch.device
    ) -> tuple[list[list[Stream]], Tensor | int | None]:
        """The items of a step, and the number of supervised tokens in the streams of all ranks."""
        if self._last_reported_step is None:
            self._last_reported_step = self.state.global_step
            self._try(self._start_files)
        items = list(islice(epoch_iterator, num_batches))
        streams = [stream for item in items for stream in item]
        _, num_items = super().get_batch_samples(iter(streams), len(streams), device)
        counts = [int((_targets(stream) != NO_LABEL).sum()) for stream in streams]
        of_ranks = self.accelerator.gather(torch.tensor(counts, device=self.args.device))
        self._num_supervised = iter(of_ranks.reshape(-1, max(1, len(counts))).sum(0).tolist())
        if self.aux_loss_enabled:
            own = torch.tensor([sum(map(_num_tokens, streams))], device=self.args.device)
            self._step_tokens = int(self.accelerator.gather(own).sum())
        return items, num_items

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Runs the streams of one item, gradients being reduced with the last one."""
        assert num_items_in_batch is not None, "the loss of a stream is a part of the global batch's"
        state, losses = self.accelerator.gradient_state, []
        ends_step = state.sync_gradients
        for number, stream in enumerate(inputs, start=1):
            is_last = number == len(inputs)
            with ExitStack() as stack:
                if ends_step and not is_last and not state.plugin_kwargs.get("sync_each_batch", False):
                    state._set_sync_gradients(False)
                    if self.accelerator.distributed_type != DistributedType.DEEPSPEED:
                        stack.enter_context(self.accelerator.no_sync(model))
                stack.enter_context(self._balance_weighted(_num_tokens(stream)))
                losses.append(super().training_step(model, stream, num_items_in_batch))  # type: ignore[no-untyped-call]
            self._metric_weights.append(next(self._num_supervised))
            self._count_reruns(stream)
            state._set_sync_gradients(ends_step)
            if not is_last:
                self.control = self.callback_handler.on_substep_end(self.args, self.state, self.control)
        return torch.stack(losses).sum()

    @contextmanager
    def _balance_weighted(self, num_tokens: int) -> Iterator[None]:
        """Inside, a stream's balance loss counts by its tokens: a step's is the mean over all of its tokens,
        where TRL's is that over micro-batches, and ranks. A stream that fills up has none."""
        if not self.aux_loss_enabled:
            yield
            return
        share = num_tokens / max(1, self._step_tokens)
        count = self.current_gradient_accumulation_steps * self.accelerator.num_processes
        self.router_aux_loss_coef = self._balance_coefficient * share * count
        self.aux_loss_enabled = num_tokens > 0  # else it is 0 / 0
        try:
            yield
        finally:
            self.router_aux_loss_coef, self.aux_loss_enabled = self._balance_coefficient, True
        if not num_tokens:
            self._metrics["train"]["aux_loss"].append(0.0)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs or "train_loss" in logs:  # the latter: at the end, of the steps not logged yet
            logs.update(self._packing_figures())
        assert self.model is not None
        if self.model.training and self._metric_weights:  # TRL would take the mean over micro-batches
            for values in (self._metrics["train"].get(name, []) for name in _TOKEN_MEANS):
                weighted = sum(map(operator.mul, values, self._metric_weights))
                values[:] = [weighted / max(1, sum(self._metric_weights))] if values else []
            self._metric_weights = []
        super().log(logs, *args, **kwargs)

    def floating_point_ops(self, inputs: Any) -> int:
        """The trainer's own count, of the tokens of an item's streams."""
        return int(super().floating_point_ops(_tokens_of(inputs)))

    def _track_num_input_tokens(self, inputs: Any) -> None:
        super()._track_num_input_tokens(_tokens_of(inputs))  # type: ignore[no-untyped-call]

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._last_reported_step = None
        return super().train(*args, **kwargs)

    def _count_reruns(self, stream: Stream) -> None:
        """With a sampler, the tokens of the micro-batch that has just run, and those that were run again."""
        assert self.model is not None
        chunked = chunk_report(self.model)
        if chunked.sample is None or "position_ids" not in stream:
            return
        num_rerun = max(0, chunked.sample.num_chunks - chunked.retained_chunks)
        self._tokens_sampled += stream["input_ids"].shape[1] * self.row_parts.num_ranks
        self._tokens_rerun += sum(
            chunk.num_tokens for chunk in chunked.sample.kept if chunk.start < num_rerun * chunked.chunk_size
        )

    def _packing_figures(self) -> dict[str, float]:
        """Counts of the optimizer steps since the last call; the plan knows all ranks', nobody is asked."""
        step = self.state.global_step
        steps = range(step if self._last_reported_step is None else self._last_reported_step, step)
        if not steps:
            return {}
        self._last_reported_step = step
        sampler = self.stream_sampler()
        plans = [sampler.plan(*divmod(number, sampler.num_batches)) for number in steps]
        assert self.model is not None
        chunked = chunk_report(self.model)
        report = PackingReport.of(
            plans,
            sampler.lengths,
            cost=sampler.cost,
            chunk_size=sampler.chunk_size,
            retained_chunks=chunked.retained_chunks,
        )
        figures = {
            "packing_imbalance": report.imbalance,
            "packing_recomputed_share": report.recomputed_share,
            "packing_empty_share": report.empty_share,
            "packing_micro_batches": float(sum(plan.num_micro_batches for plan in plans)),
        }
        if self._tokens_sampled:
            figures["packing_recomputed_share"] = self._tokens_rerun / self._tokens_sampled
            self._tokens_sampled = self._tokens_rerun = 0
        tables = {"tokens": report.tokens, "flops": report.costs}
        self._try(lambda: self._packing_file.append({"step": step, **figures, **tables}))
        return figures

    def _start_files(self) -> None:
        self._packing_file.start(self.state.global_step)
        draw_lengths(self._lengths, self._packing_file.path.with_name("lengths.png"))

    def _try(self, write: Callable[[], None]) -> None:
        """Files are no reason to lose a run: one line for the first fault."""
        if not self.is_world_process_zero() or self._has_warned:
            return
        try:
            write()
        except OSError as error:
            self._has_warned = True
            path = error.filename or self._packing_file.path
            print(f"chunkdist: warning: {path}: {error.strerror or error}; training goes on without it")
