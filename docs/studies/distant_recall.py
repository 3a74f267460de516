"""What distant tokens teach: short windows, truncated backpropagation, exact chunks, SpaCO, at equal FLOPs.

    python docs/studies/distant_recall.py --json docs/benchmarks/quality.json     # 17 minutes of CPU time

A record is one token whose id says a key and a value, with filler behind it. Questions are a key, and its
value is predicted; nothing else is. What a record says must be written into its keys and values by the chunk
that it is in, and only questions teach that. Corpus "far": records come first, then questions, never both in
one chunk. Corpus "near": a question follows each record, about one of the last, often in the same chunk;
recall is measured where it is not.

Gradients are those of `chunk_model` with the same weights of chunks, made faster: an unchunked model whose
attention weighs them (tests compare them in fp64). "Truncated": no gradient that a chunk leaves for keys and
values of earlier ones goes on. FLOPs are those of the chunked step as shared_prefixes.py counts them, without
a control variate; for single tokens, those of the forward, and of the rest the share that is kept.

Each arm has the learning rate that recalls best in a run of its own, with another seed and other sequences.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

from chunkdist import ChunkConfig, chunk_model
from chunkdist.bench.report import hardware, versions
from chunkdist.files import whole_file

sys.path.insert(0, str(Path(__file__).parent))
from shared_prefixes import Flops

NUM_KEYS, NUM_VALUES, NUM_FILLER, CHUNK_SIZE, NUM_ROWS, NUM_HELD_OUT = 16, 8, 8, 8, 16, 128
FIRST_KEY = NUM_KEYS * NUM_VALUES
FIRST_VALUE, FIRST_FILLER = FIRST_KEY + NUM_KEYS, FIRST_KEY + NUM_KEYS + NUM_VALUES
STEPS, LEARNING_RATES, TUNING_SEED, NUM_POINTS, LONGER = 300, (1e-3, 2e-3, 4e-3), 100, 8, 3
BOUNDS = (0, 1, 2, 4, 8, 16, 32)  # of distances, in chunks
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A way to train.

    Args:
        part: The tokens that are kept or dropped together.
        share: Of the parts, that are kept, each with this probability and the weight 1 / share.
        relays: Whether what later parts leave for keys and values of earlier ones goes on.
        window: Sequences are cut into windows of so many tokens.
    """

    name: str
    part: int = CHUNK_SIZE
    share: float = 1.0
    relays: bool = True
    window: int | None = None


ARMS = (
    Arm(name="short windows", window=2 * CHUNK_SIZE),
    Arm(name="truncated", relays=False),
    Arm(name="exact"),
    Arm(name="SpaCO, 1/2 of the chunks", share=1 / 2),
    Arm(name="SpaCO, 1/4 of the chunks", share=1 / 4),
    Arm(name="SpaCO, 1/2 of the tokens", share=1 / 2, part=1),
    Arm(name="SpaCO, 1/4 of the tokens", share=1 / 4, part=1),
)
TRUNCATED, EXACT = ARMS[1:3]


@dataclass(frozen=True)
class OneOf:
    """A sampler that keeps chunk `first` and each `period`-th after it, to count FLOPs."""

    first: int
    period: int

    def draw(self, scores: Tensor) -> Tensor:
        return ((torch.arange(len(scores)) - self.first) % self.period == 0).double() * self.period


class _Attend(torch.autograd.Function):
    """Causal attention; what a query leaves for a key and its value is weighed by (B, 1, queries, keys)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, weights: Tensor) -> Tensor:
        hidden = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool).triu(1)
        shares = (query @ key.mT).masked_fill_(hidden, -torch.inf).softmax(-1)
        ctx.save_for_backward(query, key, value, weights, shares)
        return shares @ value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, weights, shares = ctx.saved_tensors
        of_shares = shares * (grad @ value.mT)
        of_scores = of_shares - shares * of_shares.sum(-1, keepdim=True)
        return of_scores @ key, (of_scores * weights).mT @ query, (shares * weights).mT @ grad, None


class WeighedModel:
    """An unchunked model whose gradients are those of chunks with weights.

    Attributes:
        weights, relays: (B, T) of the next forward: of each token's output gradient, and of what later parts
            leave for its keys and values.
    """

    def __init__(self, model: Any, part: int) -> None:
        self.model, self.part = model, part
        self.weights = self.relays = torch.ones(1, 1)
        AttentionInterface.register("weighed", self._attend)
        model.set_attn_implementation("weighed")
        model.model.norm.register_forward_pre_hook(self._weigh)

    def _weigh(self, norm: Any, args: tuple[Tensor]) -> None:
        if args[0].requires_grad:
            weights_BT1 = self.weights[..., None]
            args[0].register_hook(lambda grad: grad * weights_BT1)

    def draw(self, arm: Arm, shape: torch.Size) -> None:
        """A sample for each row."""
        kept = (torch.rand(shape[0], shape[1] // self.part) < arm.share).to(self.model.dtype) / arm.share
        self.weights = kept.repeat_interleave(self.part, 1)
        self.relays = self.weights * arm.relays

    def _attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **given: Any) -> Any:
        parts = torch.arange(query.shape[2]) // self.part
        of_keys_B1TT = self.relays[:, None, None].masked_fill(parts[:, None] == parts, 1)
        return _Attend.apply(query * given["scaling"], key, value, of_keys_B1TT).transpose(1, 2), None


def far(num_rows: int, num_tokens: int, generator: torch.Generator, num_orders: int = 1) -> Batch:
    """Ids (B, T), and where the record of an answer stands (B, T); -1: no answer.

    Args:
        num_orders: So many rows ask for the same records, in other orders.
    """
    keys = torch.rand(num_rows // num_orders, NUM_KEYS, generator=generator).argsort(1)
    values = torch.randint(NUM_VALUES, keys.shape, generator=generator)
    width = num_tokens // NUM_KEYS - 2
    store = torch.randint(NUM_FILLER, (*keys.shape, width), generator=generator) + FIRST_FILLER
    store[..., 0] = keys * NUM_VALUES + values
    keys, values, store = (x.repeat_interleave(num_orders, 0) for x in (keys, values, store))
    order = torch.rand(num_rows, NUM_KEYS, generator=generator).argsort(1)
    asked = torch.stack([keys.gather(1, order) + FIRST_KEY, values.gather(1, order) + FIRST_VALUE], 2)
    ids = torch.cat([store.flatten(1), asked.flatten(1)], 1)
    record = torch.full_like(ids, -1)
    record[:, NUM_KEYS * width + 1 :: 2] = order * width
    return ids, record


def near(num_rows: int, num_tokens: int, generator: torch.Generator) -> Batch:
    """The same, where a question follows each record."""
    keys = torch.rand(num_rows, NUM_KEYS, generator=generator).argsort(1)
    values = torch.randint(NUM_VALUES, keys.shape, generator=generator)
    back = torch.empty(keys.shape).geometric_(0.25, generator=generator).long() - 1
    order = torch.arange(NUM_KEYS) - torch.minimum(back, torch.arange(NUM_KEYS))
    width = num_tokens // NUM_KEYS
    ids = torch.randint(NUM_FILLER, (*keys.shape, width), generator=generator) + FIRST_FILLER
    ids[..., 0] = keys * NUM_VALUES + values
    ids[..., -2] = keys.gather(1, order) + FIRST_KEY
    ids[..., -1] = values.gather(1, order) + FIRST_VALUE
    record = torch.full_like(ids, -1)
    record[..., -1] = order * width
    return ids.flatten(1), record.flatten(1)


CORPORA: dict[str, Callable[..., Batch]] = {"far": far, "near": near}


def new_model(seed: int) -> Any:
    torch.manual_seed(seed)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    length, size = {"max_position_embeddings": 1024}, {"vocab_size": FIRST_FILLER + NUM_FILLER}
    config = LlamaConfig(initializer_range=0.125, **shape, **length, **size)
    return LlamaForCausalLM(config).train()


def chunked(model: Any, sampler: Any = None, **given: Any) -> Any:
    given = {"chunk_size": CHUNK_SIZE, "control_variate": False, "rebuild_kv": False, **given}
    return chunk_model(model, ChunkConfig(sampler=sampler, **given))


def loss_of(model: Any, ids: Tensor, record: Tensor, window: int | None = None) -> Tensor:
    """Of the answers alone."""
    ids, labels = (x.view(-1, window or x.shape[1]) for x in (ids, ids.masked_fill(record < 0, -100)))
    loss: Tensor = model(input_ids=ids, labels=labels, use_cache=False).loss
    return loss


def counted(batch: Batch, window: int | None = None, sampler: Any = None, **given: Any) -> int:
    """FLOPs of a chunked training step."""
    model = chunked(new_model(0), sampler, **given)
    with Flops() as flops:
        loss_of(model, *batch, window).backward()
    return flops.total


def flops_of(arm: Arm, num_tokens: int) -> float:
    """FLOPs of a step, in the mean of what is sampled."""
    batch, period = far(NUM_ROWS, num_tokens, torch.Generator()), round(1 / arm.share)
    if arm.part > 1:
        samplers = [OneOf(i, period) for i in range(period)] if period > 1 else [None]
        return sum(counted(batch, arm.window, sampler) for sampler in samplers) / period
    with torch.no_grad(), Flops() as forward:
        loss_of(chunked(new_model(0)), *batch)
    return forward.total + arm.share * (counted(batch) - forward.total)


@torch.no_grad()
def figures(model: Any, held_out: Batch) -> dict[str, Any]:
    """Loss of the answers and recall, by how far away the records are: in the same chunk, and in others."""
    ids, record = held_out[0], held_out[1][:, 1:]
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    losses = F.cross_entropy(logits.mT, ids[:, 1:], reduction="none")
    is_right = (logits.argmax(-1) == ids[:, 1:]).float()
    away = torch.arange(ids.shape[1] - 1) // CHUNK_SIZE - record // CHUNK_SIZE
    away = away.masked_fill(record < 0, -1)

    def means(found: Tensor) -> dict[str, float]:
        return {"loss": losses[found].mean().item(), "recall": is_right[found].mean().item()}

    parts = {first: (away >= first) & (away < end) for first, end in pairwise(BOUNDS)}
    by_distance = [{"chunks": first, **means(found)} for first, found in parts.items() if found.any()]
    return {**means(away > 0), "by_distance": by_distance}


def train(arm: Arm, corpus: str, num_tokens: int, seed: int, rate: float, num_steps: int) -> list[Any]:
    """The figures at equal parts of a run: warmup of 20 steps, linear decay in the last quarter."""
    make, generator = CORPORA[corpus], torch.Generator().manual_seed(seed)
    held_out = make(NUM_HELD_OUT, num_tokens, torch.Generator().manual_seed(10_000 + seed))
    model, found = new_model(seed), []
    weighed = WeighedModel(model, arm.part)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(1, num_steps + 1):
        ids, record = make(NUM_ROWS, num_tokens, generator)
        weighed.draw(arm, ids.view(-1, arm.window or num_tokens).shape)
        loss_of(model, ids, record, arm.window).backward()
        optimizer.param_groups[0]["lr"] = rate * min(1, step / 20, 4 * (1 - (step - 1) / num_steps))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step * NUM_POINTS // num_steps > (step - 1) * NUM_POINTS // num_steps:
            weighed.weights = weighed.relays = torch.ones(1, 1)
            found.append({"steps": step, **figures(model, held_out)})
    return found


def run(
    corpus: str, seed: int, num_tokens: int, arm: Arm, flops: float, rate: float, times: int = 1
) -> dict[str, Any]:
    """A run of as many FLOPs as `times` times `STEPS` exact steps.

    Args:
        flops: Of a step, relative to an exact one.
    """
    torch.set_num_threads(1)
    start = time.process_time()
    points = train(arm, corpus, num_tokens, seed, rate, round(times * STEPS / flops))
    given = {"corpus": corpus, "num_tokens": num_tokens, "arm": arm.name, "seed": seed, "times": times}
    found = {**given, "step_to_exact": flops, "learning_rate": rate, "points": points}
    print(*given.values(), rate, *(f"{p['recall']:.2f}" for p in points), flush=True)
    return {**found, "cpu_s": time.process_time() - start}


def shared(num_tokens: int) -> dict[str, float]:
    """An exact step whose records 8 rows ask for, computed once, against computed in each row."""
    batch = far(NUM_ROWS, num_tokens, torch.Generator().manual_seed(0), 8)
    losses = [loss_of(chunked(new_model(0), share_prefixes=x), *batch).item() for x in (False, True)]
    plain, once = (counted(batch, share_prefixes=x) for x in (False, True))
    return {"flops_ratio": once / plain, "loss_difference": abs(losses[0] - losses[1])}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--lengths", type=int, nargs="+", default=[96, 128])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    options = parser.parse_args()
    shortest = options.lengths[0]
    flops = {n: {arm: flops_of(arm, n) / flops_of(EXACT, n) for arm in ARMS} for n in options.lengths}
    result: dict[str, Any] = {
        "benchmark": "quality",
        "command": shlex.join(["python", *sys.argv]),
        "versions": versions(),
        "hardware": hardware("cpu"),
        "num_steps": STEPS,
        "shared": shared(shortest),
    }
    pool = ProcessPoolExecutor(2)

    def ran(name: str, jobs: list[Any]) -> None:
        result[name] = []
        for job in [pool.submit(job) for job in jobs]:
            result[name].append(job.result())
            with whole_file(options.json) as unfinished:
                unfinished.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    with pool:
        of = flops[shortest]
        rates = [(arm, rate) for arm in ARMS for rate in LEARNING_RATES]
        ran("tuning", [partial(run, "far", TUNING_SEED, shortest, arm, of[arm], rate) for arm, rate in rates])
        best = {}
        for arm in ARMS:
            own = [found for found in result["tuning"] if found["arm"] == arm.name]
            best[arm] = max(own, key=lambda found: found["points"][-1]["recall"])["learning_rate"]
        cases = [("far", n) for n in options.lengths] + [("near", shortest)]
        jobs = [(name, seed, n, arm) for seed in options.seeds for name, n in cases for arm in ARMS]
        ran("runs", [partial(run, *job, flops[job[2]][job[3]], best[job[3]]) for job in jobs])
        longer = partial(
            run, num_tokens=shortest, arm=TRUNCATED, flops=1.0, rate=best[TRUNCATED], times=LONGER
        )
        ran("longer", [partial(longer, "far", seed) for seed in options.seeds])


if __name__ == "__main__":
    main()
