"""Peak memory of a training step of an 8B model, by sequence length, on a machine without a GPU.

The real code runs under fake tensors, which have shapes and no storage, and the bytes of all live tensors are
counted op by op. Weights are not counted: they are the same for all variants. Neither are a kernel's scratch
space and an allocator's rounding: a GPU takes somewhat more. All variants have flash attention, bf16, and the
same tiled loss; the last one, as transformers does it, makes all logits.

Layers are alike: each adds the same to the peak. So models of few layers are run, that this holds for them is
checked, and the figures for all layers follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from chunkdist import ChunkConfig, chunk_model
from chunkdist.bench.kernels import WHOLE
from chunkdist.bench.models import SIZES, Sizes, set_checkpointing
from chunkdist.bench.options import count, parser_of
from chunkdist.bench.report import Run
from chunkdist.bench.timing import report_progress
from chunkdist.bench.variants import BASELINE, KEPT, OFFLOADED, ONE_GROUP, REBUILT, TWICE, Variant
from chunkdist.chunking import host_memory
from chunkdist.loss.lazy_logits import lazy_logits
from chunkdist.memory import LiveBytes
from chunkdist.memory.fake_model import fake_model

NUM_LAYERS_RUN = (8, 12, 16)
ALL_LOGITS = f"{BASELINE}, all logits"
GROUPS = "chunked, groups of 4 layers, K/V rebuilt, attention forward run twice"
SMALL = Sizes(64, 16, 256, 32, 64, 16, 2, 1, lora_rank=8)
COLUMNS = ("variant", "num_tokens", "peak_bytes", "host_bytes", "bytes_per_token")
NOTE = (
    """Peak: over the weights. Memory a token: what each token adds between the first and the last length."""
)


def variants(chunk_size: int) -> list[tuple[Variant, tuple[int, int, int]]]:
    """What is compared, and the numbers of layers that are run to know about all."""

    def chunked(name: str, few: tuple[int, int, int] = NUM_LAYERS_RUN, **settings: Any) -> Any:
        settings = {"chunk_size": chunk_size, "attention": "varlen", "keep_attention": True, **settings}
        return Variant(name=name, config=ChunkConfig(**settings)), few

    return [
        (Variant(name=BASELINE), NUM_LAYERS_RUN),
        chunked(REBUILT),
        chunked(TWICE, keep_attention=False),
        chunked(GROUPS, layers_per_group=4, rebuild_kv=True, keep_attention=False),
        chunked(KEPT, rebuild_kv=False),
        chunked(ONE_GROUP, layers_per_group="all"),
        chunked(OFFLOADED, (2, 3, 4), offload="host"),
        chunked(f"{OFFLOADED}, attention forward run twice", (2, 3, 4), offload="host", keep_attention=False),
        (Variant(name=ALL_LOGITS), NUM_LAYERS_RUN),
    ]


def peak_bytes(variant: Variant, sizes: Sizes) -> tuple[int, int]:
    """The largest sum of live tensors in one LoRA step, over the weights: on the device, and on the host."""
    with FakeTensorMode() as mode:
        model: Any = fake_model(lambda: sizes.model("meta", torch.bfloat16, WHOLE), mode)
        if variant.config is not None:
            chunk_model(model, variant.config)
        else:
            set_checkpointing(model, True)
        ids = torch.zeros(1, sizes.num_tokens, dtype=torch.long)
        causal_lm = model.get_base_model()
        needs_tiles = variant.config is None and variant.name != ALL_LOGITS
        same_loss = lazy_logits(causal_lm) if needs_tiles else nullcontext()
        host = None if variant.config is None else host_memory(model)
        with LiveBytes(exclude=[*model.parameters(), *model.buffers(), ids], host=host) as live:
            with same_loss:
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
        return live.peak_bytes, 0 if host is None else host.held_bytes


def measure(sizes: Sizes, lengths: Sequence[int], chosen: Sequence[Any], run: Run) -> None:
    """A row for every variant at every length; the last of each variant has its bytes a token."""
    for variant, num_layers_run in chosen:
        peaks: dict[int, int] = {}
        for num_tokens in lengths:
            report_progress(f"{variant.name}: {num_tokens:,} tokens")
            few = num_layers_run if num_tokens == lengths[0] else num_layers_run[:2]
            device, host = {}, {}
            for num in few:
                part = replace(sizes, num_layers=num, num_tokens=num_tokens)
                device[num], host[num] = peak_bytes(variant, part)
            if num_tokens == lengths[0]:
                check_layers_are_alike(variant.name, device)
            peaks[num_tokens] = of_all_layers(device, sizes.num_layers)
            row: dict[str, Any] = {"variant": variant.name, "num_tokens": num_tokens}
            row |= {"peak_bytes": peaks[num_tokens], "host_bytes": of_all_layers(host, sizes.num_layers)}
            if num_tokens == lengths[-1]:
                slope = (peaks[num_tokens] - peaks[lengths[0]]) / (num_tokens - lengths[0])
                row["bytes_per_token"] = slope
            run.add(**row, peak_bytes_by_layers_run=device)


def check_layers_are_alike(name: str, peaks: dict[int, int]) -> None:
    """Fails where the peaks of three numbers of layers are not on a line."""
    few, some, more = (peaks[num] for num in sorted(peaks))
    if some - few != more - some:
        raise RuntimeError(f"{name}: layers do not add the same to the peak ({peaks}): run all of them")


def of_all_layers(peaks: dict[int, int], num_layers: int) -> int:
    """The peak of a model of `num_layers`, from those of models with the two numbers of layers in `peaks`."""
    few, some = sorted(peaks)[:2]
    return peaks[few] + (peaks[some] - peaks[few]) * (num_layers - few) // (some - few)


def main(arguments: Sequence[str]) -> int:
    """Runs the benchmark; returns the exit status."""
    parser = parser_of("memory", "Peak memory of a step, by sequence length.", "only")
    parser.add_argument("--num-tokens", type=count, nargs="+", help="ascending; default: 16384 32768")
    run = Run(parser, arguments, method="live bytes under FakeTensorMode; no GPU")
    smoke, only = run.options.smoke, run.options.only
    lengths = run.options.num_tokens or ([32, 64] if smoke else [2**14, 2**15])
    if len(lengths) < 2 or lengths != sorted(set(lengths)):
        parser.error(f"--num-tokens {lengths}: write two or more lengths, ascending")
    chunk_size = 16 if smoke else 2048
    chosen = [pair for pair in variants(chunk_size) if only in pair[0].name]
    if not chosen:
        parser.error(f"--only {only}: no variant has it in its name")
    if smoke:
        chosen = [(variant, (2, 3, 4)) for variant, _ in chosen[:3]]
    sizes = SMALL if smoke else SIZES["8b"]
    run.result |= {"model": {**asdict(sizes), "dtype": "bfloat16"}, "chunk_size": chunk_size}
    measure(sizes, lengths, chosen, run)
    run.end()
    return 0
