"""Long-tailed data: the time of an epoch on token streams against padded batches and TRL's packing.

Forward and backward of all sequences of a scaled-down sample (`chunkdist.data.long_tail`), without the
optimizer, in turn, in one process: the same weights, tokens, tiled loss and flash kernel. The variants differ
in what a micro-batch is:

- token streams: global batches joined to streams no longer than the longest sequence;
- padded: so many rows in the order of a shuffled epoch, padded to the longest of them, with Hugging Face's
  gradient checkpointing; 8 rows are the default of `TrainingArguments`. Padding is on the right and causal
  attention never sees it: no mask is made, which is faster than what users have;
- TRL's packing (`bfd`): rows no longer than the longest sequence, one at a time, with checkpointing, too.
"""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from chunkdist import ChunkConfig, chunk_model, unchunk_model
from chunkdist.bench.kernels import SEGMENTS
from chunkdist.bench.models import Sizes, set_checkpointing
from chunkdist.bench.options import parser_of
from chunkdist.bench.report import Run
from chunkdist.bench.rounds import allowed_difference, largest_difference
from chunkdist.bench.timing import Cost, cost_of, report_progress, rotated, times
from chunkdist.chunking import chunk_report
from chunkdist.data.assignment import plan_batch
from chunkdist.data.cost import SequenceCost
from chunkdist.data.long_tail import long_tailed_lengths
from chunkdist.data.streams import NO_LABEL, join_sequences, stream_of
from chunkdist.loss.lazy_logits import lazy_logits

STREAMS, BASELINE = "token streams", "padded, 8 rows"
BATCH_SEQUENCES = 64
COLUMNS = (
    *("variant", "outcome", "median_wall_s", "wall_speedup", "median_cpu_s", "cpu_speedup", "tokens_padded"),
    *("tokens_recomputed", "largest_gradient_difference"),
)
NOTE = f"Faster: than {BASELINE}. Gradients: of an epoch, relative, of the worst parameter."
MODELS = {
    #  sequences, what their lengths are divided by, the model
    "smoke": (24, 32, Sizes(64, 16, 256, 32, 64, 2, 2, 2)),
    "3m": (256, 8, Sizes(4096, 1024, 256, 256, 704, 4, 4, 4)),
    "1b": (256, 2, Sizes(131072, 4096, 128256, 2048, 8192, 16, 32, 32)),
}


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """How an epoch is cut into micro-batches, and which config the model is chunked with (`None`: Hugging
    Face's gradient checkpointing)."""

    name: str
    micro_batches: list[dict[str, Tensor]]
    config: ChunkConfig | None = None


def epochs_of(samples: list[dict[str, Tensor]], cost: SequenceCost, chunk_size: int) -> list[Epoch]:
    """What is compared, the baseline first; TRL's packing where it is installed."""
    lengths = [len(sample["input_ids"]) for sample in samples]
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0)).tolist()
    streams = []
    for start in range(0, len(order), BATCH_SEQUENCES):
        own = order[start : start + BATCH_SEQUENCES]
        plan = plan_batch(
            [lengths[index] for index in own],
            num_ranks=1,
            cost=cost,
            budget_tokens=max(lengths),
            chunk_size=chunk_size,
        )
        streams += [join_sequences([samples[own[i]] for i in stream]) for stream in plan.streams[0]]
    found = [
        Epoch(name=BASELINE, micro_batches=_padded(samples, order, 8)),
        Epoch(name="padded, 1 row", micro_batches=_padded(samples, order, 1)),
    ]
    if importlib.util.find_spec("trl") is not None:
        packed = [join_sequences([samples[i] for i in row]) for row in packed_by_trl(lengths)]
        found.append(Epoch(name="TRL's packing (bfd)", micro_batches=packed))
    config = ChunkConfig(chunk_size=chunk_size)
    auto = replace(config, retained_chunks="auto")
    found.append(Epoch(name=f"{STREAMS}, nothing retained", micro_batches=streams, config=config))
    return [*found, Epoch(name=STREAMS, micro_batches=streams, config=auto)]


def _padded(samples: list[dict[str, Tensor]], order: list[int], num_rows: int) -> list[dict[str, Tensor]]:
    batches = []
    for start in range(0, len(order), num_rows):
        rows = [samples[index] for index in order[start : start + num_rows]]
        ids = pad_sequence([row["input_ids"] for row in rows], batch_first=True)
        labels = pad_sequence([row["labels"] for row in rows], batch_first=True, padding_value=NO_LABEL)
        batches.append({"input_ids": ids, "labels": labels})
    return batches


def packed_by_trl(lengths: list[int]) -> list[list[int]]:
    """The rows that TRL makes, as indices of sequences."""
    from datasets import Dataset
    from trl import pack_dataset

    numbers = [[index] * length for index, length in enumerate(lengths)]
    packed: Any = pack_dataset(Dataset.from_dict({"input_ids": numbers}), max(lengths), "bfd")
    rows = [list(dict.fromkeys(row["input_ids"])) for row in packed]
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert sum(len(row["input_ids"]) for row in packed) == sum(lengths), "TRL has truncated a sequence"
    return rows


def measure(name: str, run: Run) -> None:
    """Every variant once a round, in an order that rotates.

    The gradients of a variant's first epoch are compared with the baseline's: a fast wrong step is no step.
    """
    num_sequences, divisor, sizes = MODELS[name]
    lengths = [max(2, n) for n in long_tailed_lengths(num_sequences, divisor=divisor)]
    sizes = replace(sizes, num_tokens=max(lengths))
    model = sizes.model(run.device, run.dtype, SEGMENTS)
    generator, samples = torch.Generator().manual_seed(1), []
    for length in lengths:
        ids = torch.randint(0, sizes.vocab_size, (length,), generator=generator)
        labels = torch.cat([ids[:1] * 0 + NO_LABEL, ids[1:]])
        samples.append({"input_ids": ids.to(run.device), "labels": labels.to(run.device)})
    run.result |= {
        "model": {**sizes.described(model), "num_sequences": num_sequences, "divisor": divisor},
        "data": {"num_sequences": len(lengths), "num_tokens": sum(lengths), "longest": max(lengths)},
        "baseline": BASELINE,
    }
    run.result["data"]["median"] = statistics.median(lengths)
    num_items = sum(length - 1 for length in lengths)
    epochs = epochs_of(samples, SequenceCost.of(model), sizes.chunk_size)
    for epoch in epochs:  # the kernels have run before anything is timed, and the cache has the most room
        longest = max(epoch.micro_batches, key=lambda inputs: inputs["input_ids"].numel())
        _run(model, replace(epoch, micro_batches=[longest]), num_items)
    expected: dict[str, Tensor] = {}
    costs: dict[str, list[Cost]] = {epoch.name: [] for epoch in epochs}
    rows: dict[str, dict[str, Any]] = {}
    for number in range(run.num_rounds):
        for epoch in rotated(epochs, number):
            report_progress(f"round {number + 1} of {run.num_rounds}: {epoch.name}")
            cost, num_retained = _run(model, epoch, num_items)
            costs[epoch.name].append(cost)
            if number == 0:
                grads = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
                expected = expected or grads
                difference = largest_difference(grads, expected)
                is_right = difference <= allowed_difference(model)
                rows[epoch.name] = {
                    "variant": epoch.name,
                    "outcome": "ran" if is_right else f"wrong gradients: they differ by {difference:.1e}",
                    "largest_gradient_difference": difference,
                    "num_micro_batches": len(epoch.micro_batches),
                    "tokens_padded": sum(x["input_ids"].numel() for x in epoch.micro_batches) - sum(lengths),
                    "tokens_recomputed": tokens_recomputed(epoch, sizes.chunk_size, num_retained),
                    "retained_chunks": num_retained,
                }
            for key, row in rows.items():
                if row["outcome"] == "ran":
                    row |= times(costs[key], costs[BASELINE], as_speedup=True)
            run.rows[:] = rows.values()
            run.save()


def _run(model: Any, epoch: Epoch, num_items: int) -> tuple[Cost, int]:
    """Runs an epoch; its cost, and how many chunks of a stream were retained."""
    if epoch.config is None:
        set_checkpointing(model, True)
    else:
        chunk_model(model, epoch.config)
    tiled: Callable[[], Any] = nullcontext if epoch.config is not None else lambda: lazy_logits(model)

    def all_micro_batches() -> None:
        model.zero_grad(set_to_none=True)
        for inputs in epoch.micro_batches:
            with tiled():  # a chunked model has the tiled loss by itself
                model(**inputs, num_items_in_batch=num_items).loss.backward()

    # An epoch of many lengths asks for memory here and there, in training too; another one takes too long.
    cost = cost_of(all_micro_batches, max_reruns=0)
    if epoch.config is None:
        set_checkpointing(model, False)
        return cost, 0
    num_retained = chunk_report(model).retained_chunks
    unchunk_model(model)
    return cost, num_retained


def tokens_recomputed(epoch: Epoch, chunk_size: int, num_retained: int) -> int:
    """Tokens that the backward runs again: all under checkpointing, those of chunks that are not retained."""
    if epoch.config is None:
        return sum(inputs["input_ids"].numel() for inputs in epoch.micro_batches)
    num_tokens = 0
    for inputs in epoch.micro_batches:
        starts = (inputs["position_ids"][0] == 0).nonzero().flatten()
        ends = torch.cat([starts[1:], starts.new_tensor([inputs["input_ids"].shape[1]])])
        stream = stream_of((ends - starts).tolist(), chunk_size)
        kept = stream.retained(num_retained)
        num_tokens += sum(c.num_tokens for index, c in enumerate(stream.chunks) if index not in kept)
    return num_tokens


def main(arguments: Sequence[str]) -> int:
    """Runs the benchmark; returns the exit status, which is 1 where gradients are wrong."""
    names = ("An epoch of long-tailed data, by how it is batched.", "repetitions", "threads", "device")
    parser = parser_of("long-tail", *names, num_rounds=(2, 1))
    parser.add_argument("--model", choices=["3m", "1b"], default="3m", help="default: 3m")
    run = Run(parser, arguments)
    measure("smoke" if run.options.smoke else run.options.model, run)
    run.end()
    return 0 if all(row["outcome"] == "ran" for row in run.rows) else 1
