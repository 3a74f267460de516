"""The ways of `chunkdist.bench.long_tail`: how an epoch of samples is cut into micro-batches."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AttentionMaskInterface

from chunkdist import ChunkConfig
from chunkdist.attention.base import Span
from chunkdist.bench.paper_loop import SpanKernel
from chunkdist.data.assignment import plan_batch
from chunkdist.data.cost import SequenceCost
from chunkdist.data.streams import NO_LABEL, join_sequences

STREAMS = "token streams"
BASELINE = "padded, 8 rows"
BATCH_SEQUENCES = 64
SEGMENT_FLASH = "chunkdist_bench_segments"
PADDED_FLASH = "chunkdist_bench_padded"
_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """A Llama, and the sample that it is trained on: lengths are divided by `divisor`."""

    num_sequences: int
    divisor: int
    chunk_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    vocab_size: int = 256


SIZES = {
    "smoke": Sizes(
        num_sequences=24,
        divisor=32,
        chunk_size=16,
        hidden_size=32,
        intermediate_size=64,
        num_layers=2,
        num_heads=2,
    ),
    "3m": Sizes(
        num_sequences=256,
        divisor=8,
        chunk_size=1024,
        hidden_size=256,
        intermediate_size=704,
        num_layers=4,
        num_heads=4,
    ),
    "1b": Sizes(
        num_sequences=256,
        divisor=2,
        chunk_size=4096,
        hidden_size=2048,
        intermediate_size=8192,
        num_layers=16,
        num_heads=32,
        vocab_size=128256,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Way:
    """How an epoch is cut into micro-batches, and which config the model is chunked with (`None`: Hugging
    Face's gradient checkpointing)."""

    name: str
    micro_batches: list[dict[str, Tensor]]
    config: ChunkConfig | None
    num_padded: int = 0

    @property
    def is_packed(self) -> bool:
        """Whether a row holds several sequences, which `position_ids` tell apart."""
        return "position_ids" in self.micro_batches[0]


def padded_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Flash attention, causal, on each whole row: on a CPU the kernel of `cpu_flash`, on CUDA torch's own and
    no other, as all ways have."""
    if not query.is_cuda:
        return _kernel(query, key, value, 0.0, True)[0].transpose(1, 2), None
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2), None


def segment_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Flash attention, causal, on each segment of a row that `position_ids` tell apart: on a CPU the kernel
    of `cpu_flash`, on CUDA chunkdist's fastest backend."""
    starts = (kwargs["position_ids"][0] == 0).nonzero().flatten().tolist()
    if len(starts) < 2:
        return padded_attention(module, query, key, value, mask)
    if query.is_cuda:
        ends = [*starts[1:], query.shape[2]]
        spans = tuple(Span(start, end, start, end) for start, end in zip(starts, ends, strict=True))
        scale = query.shape[-1] ** -0.5
        out: Tensor = SpanKernel.apply(scale, spans, query, key, value)  # type: ignore[no-untyped-call]
        return out, None
    lengths = torch.diff(torch.tensor([*starts, query.shape[2]])).tolist()
    parts = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    return torch.cat([_kernel(*part, 0.0, True)[0] for part in parts], dim=2).transpose(1, 2), None


for _name, _function in ((SEGMENT_FLASH, segment_attention), (PADDED_FLASH, padded_attention)):
    AttentionInterface.register(_name, _function)
    AttentionMaskInterface.register(_name, lambda **kwargs: None)


def ways(
    sizes: Sizes, samples: list[dict[str, Tensor]], cost: SequenceCost, *, device: str = "cpu"
) -> list[Way]:
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
            chunk_size=sizes.chunk_size,
        )
        streams += [join_sequences([samples[own[i]] for i in stream]) for stream in plan.streams[0]]
    made = [_padded_way(samples, order, num_rows) for num_rows in (8, 1)]
    if importlib.util.find_spec("trl") is not None:
        packed = [join_sequences([samples[i] for i in row]) for row in _packed_by_trl(lengths)]
        made.append(Way(name="TRL's packing (bfd)", micro_batches=packed, config=None))
    for name, retained in ((f"{STREAMS}, nothing retained", 0), (STREAMS, "auto")):
        config = ChunkConfig(
            chunk_size=sizes.chunk_size,
            retained_chunks=retained,  # type: ignore[arg-type]  # one of the two
            attention="cpu_flash" if device == "cpu" else "auto",
        )
        made.append(Way(name=name, micro_batches=streams, config=config))
    return [
        replace(way, micro_batches=[{k: x.to(device) for k, x in one.items()} for one in way.micro_batches])
        for way in made
    ]


def _padded_way(samples: list[dict[str, Tensor]], order: list[int], num_rows: int) -> Way:
    batches, num_padded = [], 0
    for start in range(0, len(order), num_rows):
        rows = [samples[index] for index in order[start : start + num_rows]]
        ids = pad_sequence([row["input_ids"] for row in rows], batch_first=True)
        labels = pad_sequence([row["labels"] for row in rows], batch_first=True, padding_value=NO_LABEL)
        num_padded += ids.numel() - sum(len(row["input_ids"]) for row in rows)
        batches.append({"input_ids": ids, "labels": labels})
    name = f"padded, {num_rows} row{'s' if num_rows > 1 else ''}"
    return Way(name=name, micro_batches=batches, config=None, num_padded=num_padded)


def _packed_by_trl(lengths: list[int]) -> list[list[int]]:
    """The rows that TRL makes, as indices of sequences."""
    from datasets import Dataset
    from trl import pack_dataset

    numbers = [[index] * length for index, length in enumerate(lengths)]
    packed: Any = pack_dataset(Dataset.from_dict({"input_ids": numbers}), max(lengths), "bfd")
    rows = [list(dict.fromkeys(row["input_ids"])) for row in packed]
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert sum(len(row["input_ids"]) for row in packed) == sum(lengths), "TRL has truncated a sequence"
    return rows
