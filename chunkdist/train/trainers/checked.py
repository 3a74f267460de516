"""TRL's trainers that truncate and drop nothing unasked, and whose checkpoints are whole."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard  # type: ignore[import-untyped]
from datasets import IterableDataset
from torch.utils.data import DataLoader
from trl import SFTTrainer
from trl.data_utils import get_dataset_column_names

from chunkdist.data.sample_stream import SampleStream, StreamFit
from chunkdist.data.sampler import LongestFirst
from chunkdist.data.samples import LongSamples, fit_samples, sample_lengths
from chunkdist.errors import BadSampleError
from chunkdist.train.launch.faults import asked_by
from chunkdist.train.launch.output import first_line, print_once
from chunkdist.train.launch.stopping import keep_workers
from chunkdist.train.samples.streaming import prepare_stream
from chunkdist.train.trainers.kept import KeptTrainer
from chunkdist.train.trainers.shared_rows import SharedRowsTrainer

if TYPE_CHECKING:
    from datasets import Dataset


class CheckedTrainer(KeptTrainer):
    """Before one of TRL's trainers among the bases: faults of options and samples are a line, signals are
    `StopCallback`'s."""

    def __init__(self, **kwargs: Any) -> None:
        self.is_leaving: Any = None
        """Set by `StopCallback`."""
        # Transformers' own callback for this option would take the signals: StopCallback stands for it.
        args, stops = kwargs["args"], kwargs["args"].enable_jit_checkpoint
        args.enable_jit_checkpoint = False
        super().__init__(**kwargs)
        args.enable_jit_checkpoint = stops

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Transformers' own; what it refuses is said with the options that it comes from."""
        with asked_by(f"optim={getattr(self.args.optim, 'value', self.args.optim)}", "optim_args"):
            return super().create_optimizer(*args, **kwargs)

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """Transformers' own; what it refuses is said with the options that it comes from."""
        kind = getattr(self.args.lr_scheduler_type, "value", self.args.lr_scheduler_type)
        with asked_by(f"lr_scheduler_type={kind} with lr_scheduler_kwargs={self.args.lr_scheduler_kwargs}"):
            return super().create_scheduler(*args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Transformers' own; of a bad sample only the line is told, without a data loader's traceback."""
        try:
            return super().train(*args, **kwargs)
        except BadSampleError as error:
            raise BadSampleError(str(error).strip().rpartition("BadSampleError: ")[2]) from None

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Transformers' own; its workers outlive a signal to the whole group of processes."""
        loader: DataLoader[Any] = super().get_eval_dataloader(eval_dataset)
        if self.is_leaving is not None:
            keep_workers(loader, self.is_leaving)
        return loader

    def _move_model_to_device(self, model: Any, device: torch.device) -> None:
        """A model without weights, which is not to be trained, stays where it is."""
        if not next(model.parameters()).is_meta:
            super()._move_model_to_device(model, device)


class CheckedSFTTrainer(SharedRowsTrainer, CheckedTrainer, SFTTrainer):
    """`SFTTrainer` that truncates and drops no sample unasked, and loses no work."""

    def __init__(self, *, long_samples: LongSamples, **kwargs: Any) -> None:
        self._long_samples = long_samples
        self.tokenized: dict[str, Dataset] = {}
        """The samples by the name of their data, before any is cut, until their ids have been looked at."""
        self.streams: dict[str, StreamFit] = {}
        """What samples that stream are held to, by the name of their data."""
        super().__init__(**kwargs)

    def _prepare_dataset(
        self,
        dataset: Dataset | IterableDataset,
        processing_class: Any,
        args: Any,
        packing: bool,
        formatting_func: Any,
        dataset_name: str,
    ) -> Dataset | SampleStream:
        """TRL's preparation in two parts, the check of the samples between them.

        The first part only tokenises. The second finds `input_ids` and `labels` made, and packs; that it may
        be called with what it has made itself is TRL's own contract (its `evaluate` relies on it).
        """
        columns = set(get_dataset_column_names(dataset))
        is_text = not columns & {"messages", "conversations", "prompt", "labels"}  # a turn must not be cut
        whole = copy.copy(args)
        whole.max_length, whole.shuffle_dataset = None, False
        prepare = super()._prepare_dataset

        def tokenize(rows: Dataset) -> Dataset:
            return prepare(rows, processing_class, whole, False, formatting_func, dataset_name)

        if isinstance(dataset, IterableDataset):
            fit = StreamFit(
                max_length=args.max_length,
                long_samples=self._long_samples,
                is_text=is_text,
                name=f"{dataset_name} data",
                keep_end=args.truncation_mode == "keep_end",
                say=print_once,
            )
            self.streams[dataset_name] = fit

            def prepare_part(rows: Any, is_tokenized: bool) -> Any:
                if is_tokenized:
                    return prepare(rows, processing_class, args, packing, None, dataset_name)
                return prepare(rows, processing_class, whole, False, formatting_func, dataset_name)

            return prepare_stream(dataset, fit, prepare_part, name=f"{dataset_name} data")
        tokenized = _tokenize_or_name_culprit(dataset, tokenize, dataset_name)
        kept = [
            column for column in ("input_ids", "labels", "seq_lengths") if column in tokenized.column_names
        ]
        self.tokenized[dataset_name] = tokenized
        fitting = fit_samples(
            tokenized.select_columns(kept),
            max_length=args.max_length,
            long_samples=self._long_samples,
            is_text=is_text,
            name=f"{dataset_name} data",
            keep_end=args.truncation_mode == "keep_end",
            say=print_once,
        )
        return prepare(fitting, processing_class, args, packing, None, dataset_name)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Transformers' own, but shuffled epochs begin with the longest sample."""
        loader: DataLoader[Any] = super().get_train_dataloader()
        if isinstance(self.train_dataset, SampleStream):
            return loader
        if self.args.train_sampling_strategy == "random" and isinstance(
            loader, DataLoaderShard | DataLoaderDispatcher
        ):
            loader.set_sampler(LongestFirst(loader.get_sampler(), sample_lengths(self.train_dataset)))
        return loader


def _tokenize_or_name_culprit(dataset: Dataset, tokenize: Callable[[Dataset], Dataset], name: str) -> Dataset:
    """`tokenize(dataset)`; if that fails, halves tell which sample is the first that fails alone."""
    try:
        return tokenize(dataset)
    except Exception as error:
        start, end, fault = 0, len(dataset), error
        while end - start > 1:
            middle = (start + end) // 2
            try:
                tokenize(dataset.select(range(start, middle)))
                start = middle
            except Exception as inner:
                end, fault = middle, inner
        try:
            tokenize(dataset.select(range(start, end)))
        except Exception as inner:
            raise ValueError(f"{name} data, sample {start}: {first_line(inner)}") from fault
        raise
