"""A step with the output layer tied or not, wrapped by PEFT or not, with chunks and without, by engine."""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import torch
from torch import Tensor, distributed, nn

from chunkdist import chunk_model
from chunkdist.loss import lazy_logits
from chunkdist.loss.cross_entropy import linear_cross_entropy
from tests.distributed.cases import (
    ENGINES,
    Case,
    EngineName,
    chunk_config,
    deepspeed_engine,
    micro_batches,
    reference_step,
    shard_fsdp2,
)
from tests.helpers.models import tiny_llama, with_lora


def model_of(case: Case, *, wrapped: bool, dtype: torch.dtype) -> Any:
    settings: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"], "ensure_weight_tying": False}
    if wrapped:
        settings["modules_to_save"] = ["lm_head"]
    model = tiny_llama(num_layers=2, dtype=dtype, tie_word_embeddings=case.tied)
    return with_lora(model, **settings) if case.lora else model


def difference(engine: EngineName | None, wrapped: bool, tied: bool) -> tuple[float, float, int]:
    """Relative errors of the gradients and of the loss against the unchunked step under the same engine, and
    how often the loss was computed in tiles. Without an engine, both run in one process."""
    case = Case(engine=engine or "ddp", tied=tied, lora=wrapped)
    dtype = torch.float32 if case.engine.startswith("zero") else torch.float64
    plain: nn.Module = model_of(case, wrapped=wrapped, dtype=dtype)
    chunked = chunk_model(copy.deepcopy(plain), chunk_config(case))
    run = ENGINES[case.engine] if engine else reference_step
    expected = run(plain, case)
    with mock.patch.object(lazy_logits, "linear_cross_entropy", side_effect=linear_cross_entropy) as tiled:
        found = run(chunked, case)
    assert found.gradients.keys() == expected.gradients.keys()
    assert any("lm_head" in name or tied for name in expected.gradients)
    worst = max(_error(found.gradients[name], want) for name, want in expected.gradients.items())
    return worst, _error(found.loss, expected.loss), tiled.call_count


def difference_of_logits(engine: EngineName, find_unused: bool = False) -> float:
    """The largest relative error of a gradient of a loss that comes from `outputs.loss` and the logits.

    Args:
        find_unused: DDP's `find_unused_parameters`, which sends a model's outputs through a function of its
            own.
    """
    case = Case(engine=engine)
    inputs = micro_batches(case, distributed.get_rank())[0]
    plain = model_of(case, wrapped=False, dtype=torch.float32 if "zero" in engine else torch.float64)
    found = []
    for model in (copy.deepcopy(plain), chunk_model(plain, chunk_config(case))):
        backward: Any = Tensor.backward
        read: Any = lambda p: p.grad  # noqa: E731
        if engine == "ddp":
            run: Any = nn.parallel.DistributedDataParallel(model, find_unused_parameters=find_unused)
        elif engine.startswith("fsdp2"):
            shard_fsdp2(model, case)
            run, read = model, lambda p: p.grad.full_tensor()
        else:
            from deepspeed.utils import safe_get_full_grad

            run = deepspeed_engine(model, case)
            backward, read = run.backward, safe_get_full_grad
        outputs = run(**inputs)
        backward(outputs.loss + outputs.logits.float().logsumexp(-1).mean())
        found.append({name: read(p).clone() for name, p in model.named_parameters()})
        if hasattr(run, "destroy"):
            run.destroy()
    expected, chunked = found
    return max(_error(chunked[name], want) for name, want in expected.items())


def _error(found: Tensor, expected: Tensor) -> float:
    assert expected.norm() > 0, "a gradient that is zero shows nothing"
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()
