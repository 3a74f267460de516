"""`chunkdist preview`: the first streams of a run, as a person sees what is trained on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any

import torch
from rich.text import Text

from chunkdist.data.sampler import StreamBatchSampler
from chunkdist.data.streams import NO_LABEL
from chunkdist.stream.layout import PrefixRule, SequencePlace, lay_out
from chunkdist.stream.stream import Stream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from trl import SFTTrainer

SEGMENT_COLORS = ("cyan", "magenta", "yellow", "blue")
SUPERVISED, NOT_SUPERVISED, BORDER = "bold {color}", "dim", "reverse"
Samples = Sequence[Mapping[str, Any]]


def first_streams(trainer: SFTTrainer, num_streams: int, *, num_ranks: int = 1) -> list[tuple[str, Samples]]:
    """The first streams of the first epoch of a job of `num_ranks`, each with a title, as its sequences.

    Without `chunk_packing` the first samples, or what TRL has packed, in the order of the data.
    """
    samples: Any = trainer.train_dataset
    make_sampler = getattr(trainer, "stream_sampler", None)
    if make_sampler is None:
        rows = list(islice(samples, num_streams))
        return [(f"sample {index}", list(_sequences(row))) for index, row in enumerate(rows)]
    sampler: StreamBatchSampler = make_sampler(num_ranks=num_ranks)
    plans = (sampler.plan(0, number) for number in range(sampler.num_batches))
    found = (
        (
            f"step {step}, rank {rank} of {num_ranks}, micro-batch {micro_batch}",
            [samples[index] for index in stream],
        )
        for step, plan in enumerate(plans, start=1)
        for rank, streams in enumerate(plan.streams)
        for micro_batch, stream in enumerate(streams, start=1)
        if stream
    )
    return list(islice(found, num_streams))


def render(
    title: str,
    samples: Samples,
    tokenizer: PreTrainedTokenizerBase,
    *,
    chunk_size: int,
    max_segment_tokens: int,
) -> Iterator[Text]:
    """Lines for `rich`: a stream's sequences in alternating colours, supervised tokens bright, the others
    dim, and a mark where a chunk begins.

    Args:
        max_segment_tokens: At most so many tokens of a sequence are written; how many are left out is said.
    """
    lengths = [len(sample["input_ids"]) for sample in samples]
    supervised = [_is_supervised(sample) for sample in samples]
    total, num_chunks = sum(lengths), -(-sum(lengths) // chunk_size)
    count = sum(map(sum, supervised))
    yield Text(
        f"{title}: {len(samples)} sequences, {total:,} tokens, {count:,} supervised, {num_chunks} chunks of "
        f"{chunk_size:,}, the last with {total - (num_chunks - 1) * chunk_size:,}",
        style="bold",
    )
    start = 0
    for number, (sample, flags) in enumerate(zip(samples, supervised, strict=True)):
        color = SEGMENT_COLORS[number % len(SEGMENT_COLORS)]
        first, last = start // chunk_size + 1, (start + len(flags) - 1) // chunk_size + 1
        where = f"chunk {first}" if first == last else f"chunks {first} to {last}"
        yield Text(
            f"  sequence {number + 1}: {len(flags):,} tokens, {sum(flags):,} supervised, {where}", color
        )
        line = Text("    ")
        for offset, (text, is_supervised) in enumerate(
            zip(_texts(sample["input_ids"][:max_segment_tokens], tokenizer), flags, strict=False)
        ):
            if (start + offset) % chunk_size == 0:
                line.append(f"[chunk {(start + offset) // chunk_size + 1}]", BORDER)
            line.append(text, SUPERVISED.format(color=color) if is_supervised else NOT_SUPERVISED)
        left_out = len(flags) - max_segment_tokens
        if left_out > 0:
            line.append(f" [{left_out:,} more tokens]", "italic")
        yield line
        start += len(flags)


def forest(samples: Samples, rule: PrefixRule | None) -> Iterator[Text]:
    """Lines for `rich`, where sequences of a stream share what they begin with: a line a segment, under the
    one that it goes on from.

    Args:
        rule: What they share; `None`: nothing.
    """
    ids = [torch.as_tensor(sample["input_ids"]) for sample in samples]
    if rule is None or len(ids) < 2:
        return
    shape = len(ids), max(map(len, ids))
    places = [SequencePlace(row, 0, len(own)) for row, own in enumerate(ids)]
    layout = lay_out(shape, places, torch.device("cpu"), keys=[x[:, None] for x in ids], rule=rule)
    if layout.num_tokens == layout.num_passed:
        return
    starts = layout.segment_starts
    stream = Stream(
        num_tokens=layout.num_tokens, chunks=(), segment_starts=(starts,), branches=layout.branches
    )
    yield Text(
        f"  {layout.num_tokens:,} tokens are computed, since sequences share what they begin with:", "bold"
    )
    for index, (start, end) in enumerate(pairwise((*starts, layout.num_tokens))):
        row = int(layout.sources[start]) // shape[1]
        first = int(layout.positions[start]) + 1
        last = first + end - start - 1
        yield Text(
            "    "
            + "  " * len(stream.ancestors(index))
            + f"sequence {row + 1}: tokens {first:,} to {last:,}",
            SEGMENT_COLORS[row % len(SEGMENT_COLORS)],
        )


def _sequences(row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The sequences of a row, which TRL may have packed."""
    start = 0
    for length in row.get("seq_lengths") or [len(row["input_ids"])]:
        yield {name: row[name][start : start + length] for name in ("input_ids", "labels") if name in row}
        start += length


def _is_supervised(sample: Mapping[str, Any]) -> list[bool]:
    """Which tokens are predicted: the first one has none before it."""
    labels = sample.get("labels", sample["input_ids"])
    return [position > 0 and label != NO_LABEL for position, label in enumerate(labels)]


def _texts(ids: Iterable[int], tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """The text of each token; one that is a part of a character shows with the one that ends it."""
    held: list[int] = []
    for token in ids:
        held.append(token)
        text = str(tokenizer.decode(held))
        is_part = text.endswith("\N{REPLACEMENT CHARACTER}") and len(held) < 4
        yield (
            ""
            if is_part
            else "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
        )
        held = held if is_part else []
