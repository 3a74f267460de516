"""One step of a tiny model under a sharding engine, against one process that averages the same data."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

from chunkdist import ChunkConfig, chunk_model
from chunkdist.bench.sharding import RELEASED
from chunkdist.models.layers import find_layers
from chunkdist.train.launch.ranks import skip_shm_build
from tests.helpers.hybrids import model_of
from tests.helpers.image_zoo import image_rows, tiny_image_model
from tests.helpers.models import batch, norms_in_fp64, tiny_llama, with_lora, with_positions
from tests.helpers.sweep import double_precision

EngineName = Literal["ddp", "fsdp2", "fsdp2 groups", "fsdp2 head", "zero1", "zero2", "zero3"]
CHUNK_SIZE = 4
LEARNING_RATE = 0.5
_CPU = {"device": "cpu", "pin_memory": False}
OFFLOADED = {"offload_param": _CPU, "offload_optimizer": _CPU}
"""Of ZeRO-3, weights and optimizer on the host."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """Which step is taken.

    Args:
        lengths: Tokens of the sequences, by rank or sequence group.
        sequence_ranks: Ranks of a sequence group.
        ignored_rank: All labels of this rank are ignored.
        mean_per_rank: Each rank's loss is its own mean; else all are divided by the tokens of all ranks.
        chunked: False: the plain model under the same engine.
        spaco: Every other chunk, so that one process can draw the same sample.
        hybrid: A class of tests/helpers/hybrids.py instead of Llama.
        images: A class of tests/helpers/image_zoo.py instead of Llama: two padded rows with images a rank.
        trees: Three padded rows a rank, which begin alike.
        weights_on_host: And gradients and optimizer states, between uses.
        reuse_distance: ZeRO-3 keeps a module's weights that are used again within so many numbers.
    """

    engine: EngineName
    lora: bool = False
    layers_per_group: int | Literal["all"] = 1
    retained_chunks: int = 0
    lengths: tuple[int, ...] = (CHUNK_SIZE - 1, 5 * CHUNK_SIZE + 2)
    num_micro_batches: int = 1
    ignored_rank: int | None = None
    max_grad_norm: float | None = None
    tied: bool = False
    attention: Literal["math", "cpu_flash"] = "math"
    spaco: bool = False
    hybrid: str = ""
    images: str = ""
    trees: bool = False
    mean_per_rank: bool = False
    chunked: bool = True
    sequence_ranks: int = 1
    offload: Literal["none", "host"] = "none"
    weights_on_host: bool = False
    reuse_distance: int = 0


class EveryOther:
    """A sampler that draws nothing."""

    def draw(self, scores: Tensor) -> Tensor:
        weights = torch.full_like(scores, 2.0)
        weights[1::2] = 0
        return weights


@dataclass(frozen=True)
class Errors:
    """Relative errors: the largest over all gradients, the loss's, the largest over all weights' updates.

    Of an update's, what comes of rounding the weight is taken off first.
    """

    gradients: float
    loss: float
    updates: float


@dataclass
class Step:
    """What a step leaves: the loss averaged over ranks, gradients before clipping, weights after the step."""

    loss: Tensor
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]


def errors_of(case: Case) -> Errors:
    """Runs on every rank of the group."""
    with double_precision() if case.images and case.engine.startswith("fsdp2") else nullcontext():
        return _errors_of(case)


def _errors_of(case: Case) -> Errors:
    dtype = torch.float32 if case.engine.startswith("zero") else torch.float64
    model = build(case, dtype)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    one_process = copy.deepcopy(model)
    expected = reference_step(
        chunk_model(one_process, chunk_config(case)) if case.spaco else one_process, case
    )
    if case.chunked:
        size = case.sequence_ranks
        chunk_model(model, chunk_config(case), sequence_group=sequence_group(size) if size > 1 else None)
    found = ENGINES[case.engine](model, case)
    assert found.gradients.keys() == expected.gradients.keys() == before.keys()
    assert all(gradient.norm() > 0 for gradient in expected.gradients.values()), (
        "a gradient that is zero shows nothing"
    )
    return Errors(
        gradients=max(
            _error(found.gradients[name], gradient) for name, gradient in expected.gradients.items()
        ),
        loss=_error(found.loss, expected.loss),
        updates=max(
            _update_error(found.weights[name], expected.weights[name], weight)
            for name, weight in before.items()
        ),
    )


def build(case: Case, dtype: torch.dtype) -> nn.Module:
    model: nn.Module
    if case.hybrid:
        model = model_of(case.hybrid).to(dtype)
    elif case.images:
        model = tiny_image_model(case.images).to(dtype)
    else:
        model = tiny_llama(dtype=dtype, tie_word_embeddings=case.tied, initializer_range=0.2)
        if case.trees:  # sums of branches' gradients are rounded to the dtype of norms
            norms_in_fp64(model).to(dtype)
    return with_lora(model) if case.lora else model  # type: ignore[arg-type]


def chunk_config(case: Case) -> ChunkConfig:
    return ChunkConfig(
        chunk_size=CHUNK_SIZE,
        layers_per_group=case.layers_per_group,
        retained_chunks=case.retained_chunks,
        attention=case.attention,
        offload=case.offload,
        sampler=EveryOther() if case.spaco else None,
        share_prefixes=True if case.trees else "auto",
    )


def micro_batches(case: Case, rank: int) -> list[dict[str, Any]]:
    """What one rank is given, in the order of its micro-batches."""
    if case.images:
        return [rows_with_images(case, seed=100 * rank + step) for step in range(case.num_micro_batches)]
    num_ranks = len(case.lengths)
    given = [
        [
            trees(length, seed=100 * r + step)
            if case.trees
            else batch(num_tokens=length, seed=100 * r + step)
            for step in range(case.num_micro_batches)
        ]
        for r, length in enumerate(case.lengths)
    ]
    if case.ignored_rank is not None:
        for inputs in given[case.ignored_rank]:
            inputs["labels"][:] = -100
    num_items = (
        sum((inputs["labels"][:, 1:] != -100).sum() for of_rank in given for inputs in of_rank) / num_ranks
    )
    extra = {} if case.mean_per_rank else {"num_items_in_batch": num_items / accumulation_divisor(case)}
    return [{**inputs, **extra, "use_cache": False} for inputs in given[rank]]


def rows_with_images(case: Case, seed: int) -> dict[str, Tensor]:
    dtype = torch.get_default_dtype()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        rows = image_rows(tiny_image_model(case.images).to(dtype))
    return {key: x.to(dtype) if x.is_floating_point() else x for key, x in rows.items()}


def trees(num_tokens: int, seed: int) -> dict[str, Tensor]:
    """A trunk with two branches, one of which has a branch of its own; one row is padded on the left."""
    inputs = batch(num_rows=3, num_tokens=num_tokens, seed=seed)
    ids, labels = inputs["input_ids"], inputs["labels"]
    half = -(-num_tokens // 2)
    ids[1, :half] = ids[0, :half]
    ids[2, :-1] = ids[1, :-1]
    labels[:, 1:], labels[:, 0] = ids[:, 1:], -100
    mask = torch.ones_like(ids)
    ids[1], labels[1], mask[1] = ids[1].roll(1), labels[1].roll(1), 1 - (torch.arange(num_tokens) == 0).long()
    labels[1, :2] = -100
    return with_positions({**inputs, "attention_mask": mask})


def own_micro_batches(case: Case) -> list[dict[str, Any]]:
    """What this rank is given: with a sequence group, its part of what the group is given."""
    size, rank = case.sequence_ranks, distributed.get_rank()
    if size == 1:
        return micro_batches(case, rank)
    parts = []
    for inputs in micro_batches(case, rank // size):
        num_own = inputs["input_ids"].shape[1] // size
        own = slice(rank % size * num_own, (rank % size + 1) * num_own)
        part = {name: x[:, own] for name, x in inputs.items() if name in ("input_ids", "labels")}
        parts.append({**inputs, **part, "num_items_in_batch": inputs["num_items_in_batch"] / size})
    return parts


@cache
def sequence_group(size: int) -> distributed.ProcessGroup:
    """Of this rank and its neighbours."""
    group, _ = distributed.new_subgroups(size)
    assert group is not None
    return group


def accumulation_divisor(case: Case) -> int:
    """By what the losses of micro-batches are divided. DeepSpeed does it itself; elsewhere, as in Trainer,
    the number of supervised tokens is that of all micro-batches."""
    return case.num_micro_batches if case.engine.startswith("zero") else 1


def reference_step(model: nn.Module, case: Case) -> Step:
    divisor = len(case.lengths) * accumulation_divisor(case)
    total = torch.zeros((), dtype=torch.float64)
    for rank in range(len(case.lengths)):
        for inputs in micro_batches(case, rank):
            loss = model(**inputs).loss / divisor
            loss.backward()
            total += loss.detach()
    gradients = _named_grads(model, lambda p: p.grad)
    return _updated(model, case, Step(total, gradients, {}), lambda p: p)


def _updated(model: nn.Module, case: Case, step: Step, whole: Callable[[Tensor], Tensor]) -> Step:
    """Clips, updates by SGD, and reads the weights."""
    if case.max_grad_norm is not None:
        nn.utils.clip_grad_norm_(model.parameters(), case.max_grad_norm)
    torch.optim.SGD(model.parameters(), lr=LEARNING_RATE).step()
    step.weights = {_name(name): whole(p.detach()) for name, p in model.named_parameters() if p.requires_grad}
    return step


def _ddp_step(model: nn.Module, case: Case) -> Step:
    ddp = nn.parallel.DistributedDataParallel(model)
    inputs = own_micro_batches(case)
    total = torch.zeros((), dtype=torch.float64)
    for index, one in enumerate(inputs):
        ddp.require_backward_grad_sync = index == len(inputs) - 1
        loss = ddp(**one).loss
        loss.backward()
        total += loss.detach()
    gradients = _named_grads(ddp, lambda p: p.grad)
    return _updated(ddp, case, Step(_averaged(total), gradients, {}), lambda p: p)


def shard_fsdp2(model: nn.Module, case: Case) -> None:
    """One unit a layer, or one a group; `fsdp2 head` cuts off embeddings and head, as Accelerate does."""
    inner = model.get_base_model() if case.lora else model  # type: ignore[operator]
    layers = list(find_layers(inner)[2])
    height = len(layers) if case.layers_per_group == "all" else case.layers_per_group
    if case.engine != "fsdp2 groups":
        height = 1
    policy = CPUOffloadPolicy(pin_memory=False) if case.weights_on_host else OffloadPolicy()
    shard = partial(fully_shard, offload_policy=policy)
    for start in range(0, len(layers), height):
        shard(layers[start] if height == 1 else layers[start : start + height])
    if case.engine == "fsdp2 head":
        if case.tied:
            shard([inner.model.norm, inner.model.embed_tokens, inner.lm_head])
        else:
            shard(inner.model.embed_tokens)
            shard([inner.model.norm, inner.lm_head], reshard_after_forward=False)
    shard(model)


def _fsdp2_step(model: nn.Module, case: Case) -> Step:
    shard_fsdp2(model, case)
    inputs = own_micro_batches(case)
    total = torch.zeros((), dtype=torch.float64)
    for index, one in enumerate(inputs):
        model.set_requires_gradient_sync(index == len(inputs) - 1)  # type: ignore[operator]
        loss = model(**one).loss
        loss.backward()
        total += loss.detach()
    gradients = _named_grads(model, lambda p: p.grad.full_tensor())
    return _updated(model, case, Step(_averaged(total), gradients, {}), lambda p: p.full_tensor())


def deepspeed_engine(model: nn.Module, case: Case, **settings: Any) -> Any:
    import deepspeed

    skip_shm_build()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": case.num_micro_batches,
        "gradient_clipping": case.max_grad_norm or 0.0,
        "zero_optimization": {
            "stage": int(case.engine[-1]),
            **(
                RELEASED | {"stage3_max_reuse_distance": case.reuse_distance}
                if case.engine == "zero3"
                else {}
            ),
            **(OFFLOADED if case.weights_on_host else {}),
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **settings,
    }
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine


def _deepspeed_step(model: nn.Module, case: Case) -> Step:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

    engine = deepspeed_engine(model, case)
    total = torch.zeros((), dtype=torch.float64)
    gradients: dict[str, Tensor] = {}
    for one in own_micro_batches(case):
        loss = engine(**one).loss
        engine.backward(loss)
        total += loss.detach() / case.num_micro_batches
        if engine.is_gradient_accumulation_boundary():
            gradients = _named_grads(engine.module, safe_get_full_grad)
        engine.step()
    named = [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]
    weights = {_name(name): safe_get_full_fp32_param(p).clone() for name, p in named}
    engine.destroy()
    return Step(_averaged(total), gradients, weights)


ENGINES: dict[str, Callable[[nn.Module, Case], Step]] = {
    "ddp": _ddp_step,
    "fsdp2": _fsdp2_step,
    "fsdp2 groups": _fsdp2_step,
    "fsdp2 head": _fsdp2_step,
    "zero1": _deepspeed_step,
    "zero2": _deepspeed_step,
    "zero3": _deepspeed_step,
}


def _named_grads(model: nn.Module, read: Callable[[Any], Tensor]) -> dict[str, Tensor]:
    return {_name(name): read(p).detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def _name(name: str) -> str:
    return name.removeprefix("module.")


def _averaged(loss: Tensor) -> Tensor:
    distributed.all_reduce(loss)
    return loss / distributed.get_world_size()


def _update_error(found: Tensor, expected: Tensor, before: Tensor) -> float:
    rounding = torch.finfo(before.dtype).eps * before.double().norm()
    difference = (found.double() - expected.double()).norm() - rounding
    return (difference.clamp(min=0) / (expected.double() - before.double()).norm()).item()


def _error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()
