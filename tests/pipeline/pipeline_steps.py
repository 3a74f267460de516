"""What ranks run in the tests of the pipeline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn

from chunkdist import ChunkConfig
from chunkdist.pipeline.stage_cut import cut_stages
from chunkdist.pipeline.step import Pipeline
from tests.models import VOCAB_SIZE, norms_in_fp64, tiny_llama, with_lora


@dataclass(frozen=True, kw_only=True)
class PipelineCase:
    lengths: tuple[int, ...]
    chunk_size: int = 8
    retained_chunks: int = 1
    forwards_ahead: int = 1
    num_layers: int = 3
    num_steps: int = 1
    lora: bool = False
    lora_dropout: float = 0.0
    tied: bool = False


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Of one stage, or of one process."""

    grads: dict[str, Tensor]
    loss: float


def one_process(case: PipelineCase) -> StepResult:
    """The sequences one at a time."""
    whole, model = _model(case)
    num_items = sum(length - 1 for length in case.lengths)
    total = 0.0
    for _ in range(case.num_steps):
        for sample in _samples(case):
            ids = sample["input_ids"][None]
            loss = whole(input_ids=ids, labels=ids, num_items_in_batch=num_items, use_cache=False).loss
            loss.backward()
            total += loss.item()
    return StepResult(grads=_grads(model), loss=total / case.num_steps)


def pipeline_step(case: PipelineCase) -> StepResult:
    """This rank's stage."""
    _, model = _model(case)
    config = ChunkConfig(chunk_size=case.chunk_size, retained_chunks=case.retained_chunks, attention="math")
    stages = cut_stages([1.0] * case.num_layers, distributed.get_world_size(), head_cost=0.5)
    torch.manual_seed(distributed.get_rank())
    pipeline = Pipeline(model, config, stages, forwards_ahead=case.forwards_ahead)
    for _ in range(case.num_steps):
        loss = pipeline.step(_samples(case))
    return StepResult(grads=_grads(model), loss=loss.item())


def _model(case: PipelineCase) -> tuple[Any, Any]:
    """The model or its PEFT wrapper, and the causal LM inside."""
    model = norms_in_fp64(tiny_llama(num_layers=case.num_layers, tie_word_embeddings=case.tied))
    whole: Any = with_lora(model, lora_dropout=case.lora_dropout) if case.lora else model
    return whole, model


def _samples(case: PipelineCase) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {"input_ids": torch.randint(0, VOCAB_SIZE, (length,), generator=generator)} for length in case.lengths
    ]


def _grads(model: nn.Module) -> dict[str, Tensor]:
    """By name; where embeddings are tied, the last stage has them as the head."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    if model.config.tie_word_embeddings and "lm_head.weight" in found:  # type: ignore[union-attr]
        found["model.embed_tokens.weight"] = found.pop("lm_head.weight")
    return found
