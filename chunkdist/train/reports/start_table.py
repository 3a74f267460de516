"""The table that a run starts with: what was chosen, and why."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.table import Table
from torch import nn
from transformers import TrainingArguments

from chunkdist.attention import AttentionChoice
from chunkdist.attention.base import AttentionVariant
from chunkdist.chunking import ChunkReport, model_sizes
from chunkdist.config import ChunkConfig
from chunkdist.memory.estimate import FIXED, SEQUENCE, MemoryEstimate, estimate_memory
from chunkdist.models.extend import context_extension, context_length
from chunkdist.train.launch.engine import engine_of

GIB = 2**30


def start_table(
    model: nn.Module,
    config: ChunkConfig,
    report: ChunkReport,
    args: TrainingArguments,
    stream_tokens: int | None = None,
) -> Table:
    """The choices for a run of `args` on `model`, one a row.

    Args:
        report: How `model` is chunked; its attention may not be known before the first step.
        stream_tokens: Tokens of the longest stream, where a micro-batch is one.
    """
    table = Table(title="chunkdist", title_justify="left", header_style="", show_lines=False)
    for column in ("what", "chosen", "why"):
        table.add_column(column, overflow="fold")
    for row in (
        *context_rows(model),
        *_schedule_rows(config, report, stream_tokens or num_tokens(args)),
        *experts_rows(model, _capability(args.device)),
        *_memory_rows(model, report, args, stream_tokens),
    ):
        table.add_row(*row)
    return table


def context_rows(model: nn.Module) -> list[tuple[str, str, str]]:
    """For how long sequences the model is, and what makes it so."""
    length, extension = context_length(model), context_extension(model)
    if length is None:
        return []
    return [
        ("context", f"{length:,} tokens", "as the model was made" if extension is None else str(extension))
    ]


def experts_rows(model: nn.Module, capability: tuple[int, int] | None) -> list[tuple[str, str, str]]:
    """What is to be known of a mixture of experts on this GPU.

    Args:
        capability: The GPU's; `None`: no NVIDIA GPU.
    """
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    chosen = {getattr(config, "_experts_implementation", None) for config in configs.values()}
    has_experts = any(name.endswith("experts") for name, _ in model.named_modules())
    if not has_experts or "grouped_mm" not in chosen or capability is None or capability >= (9, 0):
        return []
    why = "here torch's grouped product waits for the host 8 times a cell: larger chunks have fewer cells"
    return [("experts", "grouped_mm", why)]


def _capability(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def num_tokens(args: TrainingArguments) -> int | None:
    """Tokens of the longest row that a trainer will make, where its arguments say it (TRL's `max_length`)."""
    return getattr(args, "max_length", None)


@dataclass(frozen=True, kw_only=True)
class StepSizes:
    """What an estimate asks about a trainer's steps.

    Args:
        num_tokens: Tokens of the longest row; `None`: not known.
        num_rows: Rows of a micro-batch.
        activation_bytes: Bytes of an activation's element under autocast; `None`: without it.
        optimizer: As `TrainingArguments.optim` names it.
        num_micro_batches: Micro-batches of a step.
    """

    num_tokens: int | None
    num_rows: int
    activation_bytes: int | None
    optimizer: str
    num_micro_batches: int


def step_sizes(args: TrainingArguments, stream_tokens: int | None = None) -> StepSizes:
    """The sizes of a trainer's steps, of one stream each where `stream_tokens` is its length."""
    tokens, rows = num_tokens(args), args.per_device_train_batch_size * _rows_of_sample(args)
    if stream_tokens is not None:
        tokens, rows = stream_tokens, 1
    elif getattr(args, "packing", False) or getattr(args, "padding_free", False):
        tokens, rows = (tokens * rows if tokens else tokens), 1
    return StepSizes(
        num_tokens=tokens,
        num_rows=rows,
        activation_bytes=2 if args.bf16 or args.fp16 else None,
        optimizer=str(getattr(args.optim, "value", args.optim)),
        num_micro_batches=args.gradient_accumulation_steps,
    )


def _rows_of_sample(args: TrainingArguments) -> int:
    """2 where a sample is a chosen and a rejected row, or a row and its prompt with another's answer."""
    pairs = {"DPOConfig", "KTOConfig", "RewardConfig"}
    return 2 if pairs & {kind.__name__ for kind in type(args).__mro__} else 1


def _schedule_rows(
    config: ChunkConfig, report: ChunkReport, tokens: int | None
) -> list[tuple[str, str, str]]:
    size = report.chunk_size
    chunks = report.reason if config.chunk_size == "auto" else "as configured"
    if tokens is not None:
        chunks += f": {-(-tokens // size):,} chunks of {tokens:,} tokens"
    height = report.layers_per_group
    groups = {
        1: "the least K/V memory",
        report.num_layers: "all layers: the schedule of SeCO",
    }
    why_groups = groups.get(height, "as configured")
    if config.layers_per_group == "auto":
        why_groups = report.reason
    kept = "rebuilt in the backward" if report.rebuilds_kv else "kept from the forward"
    if config.rebuild_kv != "auto":
        why_kept = "as configured"
    elif report.rebuilds_kv:
        why_kept = "one layer a group and no retained chunk: costs its norm and projections again"
    else:
        why_kept = (
            "retained chunks hold them"
            if report.retained_chunks
            else "rebuilding would rerun a group's layers"
        )
    retained = (
        report.reason
        if config.retained_chunks == "auto"
        else "less memory"
        if report.retained_chunks == 0
        else "not recomputed: faster, their graphs stay in memory"
    )
    return [
        ("attention", report.attention, report.attention_reason),
        ("chunk size", f"{size:,} tokens", chunks),
        ("layers per group", f"{height} of {report.num_layers}", why_groups),
        ("retained chunks", str(report.retained_chunks), retained),
        ("keys and values", kept, why_kept),
        (
            "attention's outputs",
            {
                True: "kept from the forward",
                "global": "kept of layers without a window",
                False: "not kept: its forward runs twice",
            }[report.keeps_attention],
            report.keep_reason,
        ),
    ]


def _memory_rows(
    model: nn.Module, report: ChunkReport, args: TrainingArguments, stream_tokens: int | None
) -> list[tuple[str, str, str]]:
    sizes = step_sizes(args, stream_tokens)
    tokens = sizes.num_tokens
    engine = engine_of(args)
    estimate = estimate_memory(
        model_sizes(model, sizes.activation_bytes, engine.weights_dtype),
        report.config,
        num_tokens=tokens or report.chunk_size,
        num_rows=sizes.num_rows,
        engine=engine,
        optimizer=sizes.optimizer,
        num_micro_batches=sizes.num_micro_batches,
    )
    growing = f"{estimate.sequence_bytes_per_token / 1024:,.0f} KiB a token"
    parts = _parts(estimate, growing)
    if not estimate.is_complete:
        parts.append("the optimizer's states not counted")
    if tokens is None:
        fixed = estimate.peak_bytes - estimate.sequence_bytes
        return [("expected memory", f"{_gib(fixed)} and {growing}", "; ".join(parts))]
    return [("expected memory", f"about {_gib(estimate.peak_bytes)}", "; ".join(parts))]


def _parts(estimate: MemoryEstimate, growing: str) -> list[str]:
    """Where the bytes go, at the peak."""
    parts = [f"{name} {_gib(size)}" for name, size in estimate.device.items() if name in FIXED]
    parts.append(f"sequence {_gib(estimate.sequence_bytes)} ({growing})")
    rest = {k: size for k, size in estimate.device.items() if k not in (*FIXED, *SEQUENCE)}
    return [*parts, *(f"{name} {_gib(size)}" for name, size in {**rest, **estimate.host}.items())]


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.3g} GiB" if num_bytes >= GIB / 10 else f"{num_bytes / 2**20:.3g} MiB"


def with_expected_attention(model: nn.Module, report: ChunkReport, args: TrainingArguments) -> ChunkReport:
    """`report` with the attention that the first step will most likely choose, where it has not chosen yet.

    Asks the same rules, about a query made from the model's config.
    """
    model_config: Any = model.config
    text = model_config.get_text_config(decoder=True)
    head_dim = getattr(text, "qk_head_dim", None) or getattr(text, "head_dim", None)
    head_dim = head_dim or text.hidden_size // text.num_attention_heads
    parameter = next(p for p in model.parameters() if p.is_floating_point())
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else parameter.dtype
    q_TND = torch.empty(1, 1, head_dim, dtype=dtype, device=args.device)
    window, tokens = getattr(text, "sliding_window", None), num_tokens(args)
    if getattr(text, "use_sliding_window", True) is False or (window and tokens and window >= tokens):
        window = None
    kinds = set(getattr(text, "layer_types", None) or ["sliding_attention"])
    windows = (
        [None]
        if window is None
        else [window if kind == "sliding_attention" else None for kind in sorted(kinds)]
    )
    choice = AttentionChoice(report.config.attention)
    for window in windows:
        softcap = getattr(text, "attn_logit_softcapping", None)
        choice.backend_for(q_TND, AttentionVariant(scale=head_dim**-0.5, window=window, softcap=softcap))
    return replace(
        report, attention=" and ".join(choice.reasons), attention_reason="; ".join(choice.reasons.values())
    )
