"""Samples that stream are looked at as they come; the first bad one ends the run with its number.

A stream is read in its own order, again and again, so that what a step trains on follows from the step alone:
a resumed run reads and passes over what was seen, wherever an epoch ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import IterableDataset as TorchIterableDataset

from chunkdist.data.files import files_of, refuse_broken, root_message
from chunkdist.data.loading import SampleKind, kind_of_columns, sample_fault
from chunkdist.data.samples import LongSamples
from chunkdist.data.streams import NO_LABEL
from chunkdist.data.token_ids import first_outside, outside
from chunkdist.errors import BadSampleError

if TYPE_CHECKING:
    from datasets import IterableDataset

Row = Mapping[str, Any]
_COLUMNS = ("input_ids", "labels", "seq_lengths")


def first_sample(samples: IterableDataset, name: str) -> dict[str, Any]:
    """The first sample of a stream.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    for _, row in _read(samples, name):
        return dict(row)
    raise ValueError(f"{name!r} has no samples")


def checked_samples(samples: IterableDataset, *, text_field: str, name: str) -> IterableDataset:
    """The same stream, whose samples are looked at as `sample_kind` looks at those of a dataset.

    Raises:
        ValueError: of the first sample; of another one when it is read.
    """
    import datasets

    kind, used = kind_of_columns(first_sample(samples, name), text_field=text_field, name=name)
    values = {"samples": samples, "kind": kind, "used": tuple(used), "name": name}
    return datasets.IterableDataset.from_generator(_checked, gen_kwargs=values)


class StreamFit:
    """What tokenised samples of a stream are held to, and what becomes of long ones (see `fit_samples`).

    One object, however often `datasets` copies the stream: `limits` are known when the model is.
    """

    def __init__(
        self,
        *,
        max_length: int | None,
        long_samples: LongSamples,
        is_text: bool,
        name: str,
        keep_end: bool = False,
        say: Callable[[str], None] = print,
    ) -> None:
        if long_samples == "split" and not is_text:
            raise ValueError(
                "long_samples=split cuts plain text only, and this is another kind: write truncate or drop"
            )
        self._max_length, self._long_samples, self._name = max_length, long_samples, name
        self._is_text, self._keep_end, self._say = is_text, keep_end, say
        self._has_said = False
        self.limits: tuple[int, int] | None = None
        """Rows of the embedding and of the output layer."""

    def __deepcopy__(self, memo: dict[int, Any]) -> StreamFit:
        return self

    def fitted(self, samples: IterableDataset) -> IterableDataset:
        """The samples, none longer than `max_length`, with what a model is trained on only."""
        import datasets

        return datasets.IterableDataset.from_generator(_fitted, gen_kwargs={"fit": self, "samples": samples})

    def fault(self, ids: list[int], labels: list[int]) -> str | None:
        """What is wrong with a sample, as of the checks of a whole dataset."""
        if len(ids) < 2:
            return f"has {'one' if ids else 'no'} token: there is no next token to predict; take it out"
        if all(label == NO_LABEL for label in labels[1:]):
            return "has no supervised token: take it out, or look at the options that mask tokens"
        for column, values, number in (("input_ids", ids, 0), ("labels", labels, 1)):
            if self.limits is None:
                break
            tokens, limit = np.asarray(values), self.limits[number]
            position = first_outside(tokens, limit, allowed=NO_LABEL if number else None)
            if position is not None:
                return outside(column, int(tokens[position]), limit)
        return None

    def pieces(self, row: Row, number: int) -> Iterator[dict[str, list[int]]]:
        """What is trained on of a sample.

        Raises:
            BadSampleError: names it.
        """
        where = f"{self._name}, sample {number}"
        fault = self.fault(row["input_ids"], row["labels"])
        if fault is not None:
            raise BadSampleError(f"{where}: {fault}")
        kept, length, limit = (
            {k: row[k] for k in _COLUMNS if k in row},
            len(row["input_ids"]),
            self._max_length,
        )
        if limit is None or length <= limit:
            yield kept
            return
        if self._long_samples == "error":
            others = "truncate, drop or split" if self._is_text else "truncate or drop"
            raise BadSampleError(
                f"{where}: has {length} tokens, more than max_length={limit}: raise max_length, or write "
                f"long_samples: {others}"
            )
        if not self._has_said:
            self._has_said = True
            self._say(
                f"{where}: longer than max_length={limit} tokens: what becomes of it and of all "
                f"such samples is long_samples={self._long_samples}"
            )
        if self._long_samples == "drop":
            return
        if self._long_samples == "truncate":
            part = slice(-limit, None) if self._keep_end else slice(None, limit)
            labels = row["labels"][part]
            if all(label == NO_LABEL for label in labels[1:]):
                kind = "last" if self._keep_end else "first"
                raise BadSampleError(f"{where}: no supervised token is among its {kind} {limit} tokens")
            yield {"input_ids": row["input_ids"][part], "labels": labels}
            return
        for start in range(0, length, limit):
            yield {k: row[k][start : start + limit] for k in ("input_ids", "labels")}


class SampleStream(TorchIterableDataset[dict[str, Any]]):
    """Prepared samples as a data loader takes them: over and over, or once."""

    def __init__(self, samples: IterableDataset, *, repeats: bool) -> None:
        self._samples, self._repeats = samples, repeats

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for epoch in count():
            self._samples.set_epoch(epoch)  # another order, where the stream is shuffled
            is_empty = True
            for sample in self._samples:
                is_empty = False
                yield {column: sample[column] for column in _COLUMNS if column in sample}
            assert not is_empty, "looked at when the stream was prepared"
            if not self._repeats:
                return

    def once(self) -> SampleStream:
        """The same samples, of one epoch."""
        return SampleStream(self._samples, repeats=False)


def _checked(samples: Iterable[Row], kind: SampleKind, used: tuple[str, ...], name: str) -> Iterator[Row]:
    for number, row in _read(samples, name):
        fault = sample_fault(row, kind, list(used))
        if fault is not None:
            raise BadSampleError(f"{name!r}, sample {number}: {fault}")
        yield row


def _fitted(fit: StreamFit, samples: Iterable[Row]) -> Iterator[dict[str, list[int]]]:
    for number, row in _read(samples, fit._name, of_files=False):
        yield from fit.pieces(row, number)


def _read(samples: Iterable[Row], name: str, *, of_files: bool = True) -> Iterator[tuple[int, Row]]:
    """Numbered samples; whatever comes of reading one is a `BadSampleError` that names it."""
    rows = iter(samples)
    for number in count():
        try:
            row = next(rows)
        except StopIteration:
            return
        except BadSampleError:
            raise
        except Exception as error:
            for file in files_of(Path(name).expanduser()) if of_files else ():
                refuse_broken(file)
            raise BadSampleError(f"{name}, sample {number}: {root_message(error)}") from error
        yield number, row
